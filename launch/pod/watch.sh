# Part of tpu_pod.sh: a stage that runs on the workers, seen from here.
# shellcheck shell=bash disable=SC2034  # OUTCOME is read by supervise.sh

# Workers may end one after the other, and a preempted TPU says so only some
# time after its processes died: until then, a failure is not taken for one.
readonly SETTLE_SECONDS=90

# How long nobody may answer, here or there, before the stage is given up for
# interrupted.
readonly BLIND_SECONDS=1800

start_everywhere() {
  say "starting $1 on all workers"
  if ! on_workers all "$(worker_sh start "$1" "${COMMAND[@]}")" \
    >"$SCRATCH/start" 2>"$SCRATCH/ssh"; then
    cat "$SCRATCH/start" >&2
    _not_reached "$1 could not be started on all workers"
    return 1
  fi
  sort -u "$SCRATCH/start" | sed -n 's/^worker 0: /pod: worker 0: /p' >&2
}

# The job on every worker, as worker.sh's `report` has it.
reports() {
  if dry; then
    on_workers all "$(worker_sh report)"
    printf 'report\t0\texited\tBEGAN\t0\t-\t-\n'
    return
  fi
  on_workers all "$(worker_sh report)" 2>"$SCRATCH/ssh" |
    grep -a $'^report\t' | sort -t $'\t' -k 2n
}

# verdict: lost (the TPU), blind (no worker answers), running, finished,
# stopped, rebooted, signalled or failed. Leaves the reports behind.
verdict() {
  local state
  state=$(tpu_state)
  if is_lost "$state"; then
    printf 'lost\n'
  elif ! reports >"$SCRATCH/reports"; then
    printf 'blind\n'
  else
    awk -F '\t' '
      $3 == "running" { running++ }
      $3 == "stopped" { stopped++ }
      $3 == "rebooted" || $3 == "absent" { rebooted++ }
      $3 == "killed" { failed++ }
      # Told to end, or (75) lost another worker: not the cause of anything.
      $3 == "exited" && $5 ~ /^(130|143|75)$/ { signalled++; next }
      $3 == "exited" && $5 != 0 { failed++ }
      END {
        if (stopped && !running) print "stopped"
        else if (failed) print "failed"
        else if (rebooted) print "rebooted"
        else if (signalled) print "signalled"
        else if (running || !NR) print "running"
        else print "finished"
      }' "$SCRATCH/reports"
  fi
}

# settle: asks until the answer is one to act on.
settle() {
  local since answer patience
  since=$(now)
  while :; do
    answer=$(verdict)
    case $answer in
      lost | running | finished | stopped) break ;;
    esac
    patience=$SETTLE_SECONDS
    [ "$answer" != blind ] || patience=$BLIND_SECONDS
    [ $(($(now) - since)) -lt $patience ] || break
    pause 10
  done
  printf '%s\n' "$answer"
}

# _stream COPY BEGAN: prints what is missing of worker 0's log, and keeps it.
_stream() {
  local have=0
  [ ! -f "$1" ] || have=$(wc -c <"$1")
  on_workers 0 "$(worker_sh follow "$2" "$((have))")" 2>"$SCRATCH/stream" \
    </dev/null | if dry; then cat; else tee -a "$1"; fi
}

_stop_streaming() {
  [ -n "$STREAMER" ] || return 0
  kill -TERM -- "-$STREAMER" 2>/dev/null || true
  wait "$STREAMER" 2>/dev/null || true
  STREAMER=''
}

# watch_stage NAME: streams until the stage is no longer running; OUTCOME is
# finished, stopped, crashed, preempted, interrupted or budget.
watch_stage() {
  local name=$1 began copy checked looks=0 answer=running complete=''
  # A preemption may come at any moment, this one too.
  if ! reports >"$SCRATCH/reports"; then
    answer=$(settle)
  fi
  began=$(awk -F '\t' '$2 == 0 { print $4 }' "$SCRATCH/reports")
  copy=$(state_dir)/$name-${began:-unknown}.log
  checked=$(now)
  while [ "$answer" = running ]; do
    if dry; then
      _stream "$copy" "$began"
      complete=yes answer=$(settle)
      break
    fi
    if [ -z "$STREAMER" ]; then
      # A process group of its own, so that it can be ended with what it runs.
      set -m
      _stream "$copy" "$began" &
      STREAMER=$!
      set +m
    elif ! kill -0 "$STREAMER" 2>/dev/null; then
      complete=''
      if wait "$STREAMER"; then complete=yes; fi
      STREAMER=''
      answer=$(settle)
      [ "$answer" != running ] || {
        say 'the log ended but the stage is running: connecting again'
        pause 5
      }
      continue
    fi
    pause 1
    if [ $(($(now) - checked)) -ge 60 ]; then
      checked=$(now)
      charge "$name"
      if over_budget "$name"; then
        answer=budget
      elif is_lost "$(tpu_state)"; then
        answer=lost
      elif looks=$((looks + 1)) && [ $((looks % 5)) = 0 ]; then
        answer=$(settle)
      fi
    fi
  done
  _stop_streaming
  dry || charge "$name"
  case $answer in
    lost) OUTCOME=preempted ;;
    failed)
      OUTCOME=crashed
      _show_failures
      ;;
    rebooted | signalled | blind)
      say "the workers say: $answer"
      OUTCOME=interrupted
      ;;
    *) OUTCOME=$answer ;;
  esac
  # What came after the connection broke; by now nothing runs.
  case $complete:$OUTCOME in
    :finished | :crashed | :stopped) _stream "$copy" "$began" || true ;;
  esac
  dry || say "worker 0's log: $copy"
}

# Names the workers that failed, shows the end of the log of some of them, and
# stops the others, which would wait for them.
_show_failures() {
  local number code shown=0 word
  while IFS=$'\t' read -r _ number word _ code _ _; do
    case $word:$code in
      killed:*) word='was killed without a word (out of memory?)' ;;
      exited:137) word='was killed (exit 137; out of memory?)' ;;
      exited:0 | exited:130 | exited:143 | exited:75) continue ;;
      running:* | stopped:*) continue ;;
      *) word="ended with exit status $code" ;;
    esac
    say "worker $number $word"
    shown=$((shown + 1))
    [ $shown -le 3 ] || continue
    on_workers "$number" "$(worker_sh tail 40)" 2>"$SCRATCH/ssh" |
      sed "s/^/worker $number: /" >&2 || true
  done <"$SCRATCH/reports"
  on_workers all "$(worker_sh stop 30)" >/dev/null 2>"$SCRATCH/ssh" || true
}
