# Part of tpu_pod.sh: a stage as several processes of this machine, with
# virtual CPU devices and gloo in place of chips and their links.
# shellcheck shell=bash disable=SC2153  # ROOT is tpu_pod.sh's

# How long the others may take to end once one process has died: they cannot
# save without it.
readonly LOCAL_GRACE_SECONDS=10

run_local() {
  local name=$1 count=$QWENVL_POD_LOCAL folder
  local devices=${QWENVL_POD_DEVICES_PER_PROCESS:-1}
  [ "$count" -ge 1 ] || usage_error '--local needs one process or more'
  command -v setsid >/dev/null || die '--local needs setsid (Linux has it)'
  [ "$devices" -ge 1 ] || usage_error '--devices-per-process: one or more'
  COMMAND+=("${EXTRA[@]}")
  # Tests name the interpreter that they run in.
  if [ -n "${QWENVL_POD_PYTHON:-}" ]; then
    COMMAND=("$QWENVL_POD_PYTHON" -m qwenvl_jax.train.main "${COMMAND[@]:1}")
  elif ! dry; then
    # shellcheck source=launch/env.sh
    source "$ROOT/launch/env.sh"
  fi
  folder=$QWENVL_POD_STATE/local/$name-$(date -u +%Y%m%dT%H%M%S)-$$
  LOCAL_PORT=$(_free_port)
  PIDS=()
  _each_local "$name" "$count" "$devices" "$folder"
  dry && return 0
  _follow_local "$name" "$count" "$folder"
}

# A port that nobody listens on now.
_free_port() {
  local port
  dry && printf 'PORT\n' && return
  while :; do
    port=$((20000 + RANDOM % 20000))
    (exec 4<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  printf '%s\n' "$port"
}

# Starts the processes, or prints how.
_each_local() {
  local name=$1 count=$2 devices=$3 folder=$4 i command
  for ((i = 0; i < count; i++)); do
    command=(
      env "QWENVL_COORDINATOR=127.0.0.1:$LOCAL_PORT"
      "QWENVL_NUM_PROCESSES=$count" "QWENVL_PROCESS_ID=$i"
      JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices"
      "QWENVL_POD_HOME=$folder/worker$i"
      bash "$ROOT/launch/pod/worker.sh" run "$name" "${COMMAND[@]}"
    )
    if dry; then
      quote "${command[@]}"
      continue
    fi
    # Apart from the terminal's process group, so that Ctrl-C reaches them
    # only through us, and once.
    setsid "${command[@]}" </dev/null &
    PIDS[i]=$!
  done
  dry || say "$count processes with $devices devices each: ${COMMAND[*]}"
}

_follow_local() {
  local name=$1 count=$2 folder=$3 i running codes=() first='' began=''
  SIGNALS=0 SIGNAL=0
  trap '_forward 2' INT
  trap '_forward 15' TERM
  say "logs: $folder/worker*/job/log; worker 0's:"
  until [ -f "$folder/worker0/job/log" ] || ! kill -0 "${PIDS[0]}" 2>/dev/null; do
    sleep 0.05
  done
  tail -n +1 -F -s 0.2 "--pid=${PIDS[0]}" "$folder/worker0/job/log" \
    2>/dev/null &
  STREAMER=$!
  while :; do
    running=0
    for ((i = 0; i < count; i++)); do
      [ -z "${codes[i]:-}" ] || continue
      if kill -0 "${PIDS[i]}" 2>/dev/null; then
        running=$((running + 1))
        continue
      fi
      codes[i]=0
      wait "${PIDS[i]}" || codes[i]=$?
      if [ "${codes[i]}" = 0 ] || [ $SIGNALS -gt 0 ]; then
        continue
      fi
      [ -n "$began" ] || began=$SECONDS
      # 75 says that another was lost: that one comes to light, too.
      if [ -z "$first" ] && [ "${codes[i]}" != 75 ]; then
        first=$i
        _tell_dead "$i" "${codes[i]}" "$folder"
        [ $running = 0 ] || say 'the others cannot go on without it'
        _signal_all TERM
      fi
    done
    [ $running -gt 0 ] || break
    if [ $SIGNALS -gt 1 ] || { [ -n "$began" ] &&
      [ $((SECONDS - began)) -ge $LOCAL_GRACE_SECONDS ]; }; then
      _signal_all KILL
    fi
    sleep 0.2 || true
  done
  wait "$STREAMER" || true
  if [ -n "$first" ]; then
    exit "${codes[first]}"
  elif [ -n "$began" ]; then
    die 'a process was lost: see the logs'
  elif [ $SIGNALS -gt 0 ] && [[ " ${codes[*]} " == *' '[1-9]* ]]; then
    exit $((128 + SIGNAL))
  fi
  say "$name is finished on all $count processes: $QWENVL_POD_WORKDIR"
}

_tell_dead() {
  local why="exit status $2" log=$3/worker$1/job/log
  if [ "$2" -gt 128 ]; then
    why="signal $(kill -l $(($2 - 128)) 2>/dev/null || printf '?')"
  fi
  say "worker $1 died ($why); the end of its log:"
  tail -n 15 "$log" 2>/dev/null | sed "s/^/worker $1: /" >&2
}

_forward() {
  SIGNALS=$((SIGNALS + 1)) SIGNAL=$1
  if [ $SIGNALS = 1 ]; then
    say 'stopping all processes, which save; once more ends them at once'
    _signal_all TERM
  fi
}

# TERM goes to worker.sh, which passes it on; KILL to all that it started.
_signal_all() {
  local pid
  for pid in "${PIDS[@]}"; do
    if [ "$1" = KILL ]; then
      kill -KILL -- "-$pid" 2>/dev/null || true
    else
      kill "-$1" "$pid" 2>/dev/null || true
    fi
  done
}
