# Part of tpu_pod.sh: keeps a stage going until it is done.
# shellcheck shell=bash

# Ended by hand or by their own limit, apart from failures (1).
readonly EXIT_LIMIT=3 EXIT_STOPPED=143

# What the TPU was used for a stage, in seconds, over all calls of this script.
_spent_file() { printf '%s\n' "$(state_dir)/spent-$1"; }

_spent() { cat "$(_spent_file "$1")" 2>/dev/null || printf '0\n'; }

# charge NAME: counts the time since the last charge.
charge() {
  local time
  time=$(now)
  printf '%s\n' $(($(_spent "$1") + time - CHARGED)) >"$(_spent_file "$1")"
  CHARGED=$time
}

over_budget() {
  [ -n "${QWENVL_POD_BUDGET:-}" ] &&
    awk "BEGIN { exit !($(_spent "$1") >= $QWENVL_POD_BUDGET * 3600) }"
}

_hours() {
  awk "BEGIN { printf \"%.1f\", $(_spent "$1") / 3600 }"
  [ -z "${QWENVL_POD_BUDGET:-}" ] || printf ' of %s' "$QWENVL_POD_BUDGET"
}

# Two of these would re-create the same TPU at once.
_lock() {
  dry && return 0
  mkdir -p "$(state_dir)"
  command -v flock >/dev/null || return 0
  exec 9>"$(state_dir)/lock"
  flock -n 9 || die "another tpu_pod.sh looks after $QWENVL_POD_TPU already" \
    "launch/tpu_pod.sh status --tpu $QWENVL_POD_TPU tells how it is"
}

_detach() {
  _stop_streaming
  if [ -n "$RUNNING" ]; then
    say "detached: $1 goes on, but nobody re-creates the TPU if it is preempted"
    say 'the same command attaches again; stop ends the stage, down the TPU'
  else
    say "left: the TPU, or the request for it, stays; $1 is not running"
    say 'the same command goes on from here; down deletes the TPU'
  fi
  exit "$2"
}

# run_stage NAME: exit status 0 when it is finished.
run_stage() {
  local name=$1 restarts=0 streak=0 delay began
  need_zone
  check_gcloud
  COMMAND+=(--distributed "${EXTRA[@]}")
  _lock
  case $QWENVL_POD_WORKDIR in
    *://*) ;;
    *)
      say "note: --workdir $QWENVL_POD_WORKDIR is not in a bucket: all workers must" \
        'see the same folder there, and it must outlive the TPU (NFS does)'
      ;;
  esac
  say "$name on every worker: $(quote "${COMMAND[@]}")"
  if over_budget "$name"; then
    _give_up "$name" "the budget of $QWENVL_POD_BUDGET TPU hours is used up"
  fi
  if ! dry; then
    trap '_detach "$name" 130' INT
    trap '_detach "$name" 143' TERM
  fi
  while :; do
    OUTCOME=''
    if bring_up; then
      CHARGED=$(now)
      if install_everywhere && start_everywhere "$name"; then
        began=$(now)
        RUNNING=yes
        watch_stage "$name"
        RUNNING=''
        [ $(($(now) - began)) -lt 3600 ] || streak=0
      elif ! dry; then
        charge "$name"
      fi
    fi
    case $OUTCOME in
      finished) break ;;
      stopped)
        say "$name was stopped; the same command goes on from its checkpoint"
        exit $EXIT_STOPPED
        ;;
      crashed)
        die "$name failed on its own account: starting it again would not help" \
          'see the log above; mend the cause, then the same command goes on'
        ;;
      budget)
        say 'the budget is used up: stopping (which saves)'
        on_workers all "$(worker_sh stop "$QWENVL_POD_GRACE")" >&2 || true
        _give_up "$name" "the budget of $QWENVL_POD_BUDGET TPU hours is used up"
        ;;
    esac
    restarts=$((restarts + 1))
    if [ $restarts -gt "$QWENVL_POD_MAX_RESTARTS" ]; then
      _give_up "$name" "$OUTCOME again, after $QWENVL_POD_MAX_RESTARTS restarts"
    elif over_budget "$name"; then
      _give_up "$name" "the budget of $QWENVL_POD_BUDGET TPU hours is used up"
    fi
    delay=$((QWENVL_POD_BACKOFF << (streak < 12 ? streak : 12)))
    [ $delay -le 1800 ] || delay=1800
    streak=$((streak + 1))
    say "$OUTCOME; trying again in $(duration $delay) (restart $restarts of" \
      "at most $QWENVL_POD_MAX_RESTARTS; $(_hours "$name") TPU hours used)"
    if [ "$OUTCOME" = preempted ]; then
      # It takes up quota until it is deleted.
      case $(queue_state) in ABSENT*) ;; *) remove_request ;; esac
    fi
    pause $delay
  done
  if ! dry; then
    say "$name is finished ($(_hours "$name") TPU hours):" \
      "$QWENVL_POD_WORKDIR"
    rm -f "$(_spent_file "$name")"
  fi
  _leave
}

_give_up() {
  say "error: $2; $1 goes on from its checkpoint when started again"
  _leave
  exit $EXIT_LIMIT
}

# What happens to a TPU that is no longer used.
_leave() {
  if [ -n "${QWENVL_POD_DELETE_AFTER:-}" ]; then
    YES=yes take_down
  else
    say "TPU $QWENVL_POD_TPU is kept, and paid for, until:" \
      "launch/tpu_pod.sh down --tpu $QWENVL_POD_TPU"
  fi
}
