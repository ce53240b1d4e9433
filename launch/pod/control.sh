# Part of tpu_pod.sh: looking at a pod, and ending what runs there.
# shellcheck shell=bash

show_status() {
  local queue tpu
  queue=$(queue_state)
  tpu=$(tpu_state)
  printf 'TPU %s in %s: %s (queued resource: %s)\n' "$QWENVL_POD_TPU" \
    "$QWENVL_POD_ZONE" "$tpu" "$(tr '\t' ' ' <<<"$queue")"
  if [ "$tpu" = UNKNOWN ]; then
    explain "$SCRATCH/describe" >/dev/null
    return 1
  elif is_lost "$tpu"; then
    return 0
  fi
  if ! reports >"$SCRATCH/reports"; then
    explain "$SCRATCH/ssh" >/dev/null
    die 'the workers do not answer'
  fi
  awk -F '\t' '{
    how = $3 == "exited" || $3 == "stopped" ? " (exit " $5 ")" : ""
    printf "worker %s: %s %s%s since %s  %s\n", $2, $6, $3, how, $4, $7
  }' "$SCRATCH/reports"
}

show_log() {
  local began
  if [ -z "${FOLLOW:-}" ]; then
    on_workers "$QWENVL_POD_WORKER" "$(worker_sh tail "$QWENVL_POD_LINES")"
    return
  fi
  began=$(on_workers "$QWENVL_POD_WORKER" "$(worker_sh report)" |
    awk -F '\t' '$1 == "report" { print $4 }')
  on_workers "$QWENVL_POD_WORKER" "$(worker_sh follow "${began:-BEGAN}" 0)"
}

stop_stage() {
  say "SIGTERM to all workers, which save; up to $QWENVL_POD_GRACE s"
  on_workers all "$(worker_sh stop "$QWENVL_POD_GRACE")" || {
    die 'not all workers answered'
  }
}
