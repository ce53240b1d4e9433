#!/usr/bin/env bash
# What one worker of a pod does. tpu_pod.sh calls this over ssh on each worker,
# and for each process of --local. One job at a time; `job/` tells of the last.
set -euo pipefail

here=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
checkout=${here%/launch/pod}
# Holds the checkout, its `installed` mark, `job/`, and buckets as folders.
home=${QWENVL_POD_HOME:-${checkout%/*}}
job=$home/job

# shellcheck source=launch/pod/buckets.sh
source "$here/buckets.sh"

usage() {
  cat <<'TEXT'
Usage: worker.sh VERB (called by launch/tpu_pod.sh)

  install TREE EXTRAS         make this code the checkout, and its environment
  start NAME COMMAND...       run a command that outlives the connection, on
                              folders where it says mount://BUCKET
  run NAME COMMAND...         run it here: log, pid and exit status in job/
  report                      a line of tab-separated fields about the job
  follow BEGAN OFFSET         its log from a byte on until it ends
  tail LINES                  the end of its log
  stop SECONDS                SIGTERM, which saves; after so long SIGKILL
TEXT
}

# This worker's number in the pod, or a question mark.
number() {
  local found
  if [ -n "${QWENVL_PROCESS_ID:-}" ]; then
    found=$QWENVL_PROCESS_ID
  else
    found=$(curl -fsS --max-time 5 -H 'Metadata-Flavor: Google' \
      "http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number" \
      2>/dev/null) || found=$(hostname | sed -n 's/.*-w-\([0-9]*\)$/\1/p')
  fi
  printf '%s\n' "${found:-?}"
}

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || printf '?\n'; }

# Whether the job's process is there: its number may be another's by now.
alive() {
  local pid
  pid=$(cat "$job/pid" 2>/dev/null) || return 1
  kill -0 "$pid" 2>/dev/null && [ "$(boot)" = "$(cat "$job/boot")" ] &&
    grep -aq 'worker\.sh' "/proc/$pid/cmdline" 2>/dev/null
}

field() { cat "$job/$1" 2>/dev/null || true; }

# The interpreter for the environment: TPU VMs come with Python 3.10, and
# their package manager is often locked in the first minutes.
interpreter() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c 'import ensurepip, sys, venv
sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet uv >&2
  python3 -m uv python install --quiet 3.11 >&2
  python3 -m uv python find 3.11
}

install() {
  local tree=$1 extras=$2 me log=$home/install.log
  me=$(number)
  if alive; then
    printf 'worker %s: FAILED: %s is running; stop it first\n' \
      "$me" "$(field name)"
    return 1
  fi
  # The environment stays, if it is still the right one: env.sh looks.
  if [ "$checkout" = "$home/new" ]; then
    if [ -d "$home/checkout/.venv" ]; then
      mv "$home/checkout/.venv" "$home/new/.venv"
    fi
    rm -rf "$home/checkout"
    mv "$home/new" "$home/checkout"
  fi
  printf 'worker %s: installing\n' "$me"
  if ! { PYTHON=$(interpreter) && export PYTHON &&
    EXTRAS=$extras "$home/checkout/launch/env.sh"; } >"$log" 2>&1; then
    tail -n 20 "$log" | sed "s/^/worker $me: /"
    printf 'worker %s: FAILED: the above is the end of %s\n' "$me" "$log"
    return 1
  fi
  printf '%s %s\n' "$tree" "$extras" >"$home/installed"
  printf 'worker %s: ready\n' "$me"
}

# Makes job/ anew, keeping the log of what ran before.
prepare() {
  local name=$1 began
  shift
  if [ -d "$job" ]; then
    mkdir -p "$home/earlier"
    mv "$job" "$home/earlier/$(field name)-$(field began)-$$"
  fi
  mkdir -p "$job"
  began=$(date -u +%Y%m%dT%H%M%S)
  printf '%s\n' "$name" >"$job/name"
  printf '%s\n' "$began" >"$job/began"
  boot >"$job/boot"
  printf '%s\n' "$*" >"$job/command"
  : >"$job/log"
}

start() {
  local me name=$1 bucket
  me=$(number)
  shift
  for bucket in $(buckets_of "$@"); do
    if ! mount_bucket "$bucket" "$home/buckets/$bucket" \
      >"$home/mount.log" 2>&1; then
      tail -n 5 "$home/mount.log" | sed "s/^/worker $me: /"
      printf 'worker %s: FAILED: bucket %s cannot be mounted: %s\n' "$me" \
        "$bucket" 'does it exist, and may the service account use it?'
      return 1
    fi
  done
  set -- "${@//mount:\/\//$home/buckets/}"
  if alive; then
    if [ "$(field name)" = "$name" ] && [ "$(field command)" = "$*" ]; then
      printf 'worker %s: %s is running since %s\n' "$me" "$name" \
        "$(field began)"
      return 0
    fi
    printf 'worker %s: FAILED: %s is running, started otherwise\n' "$me" \
      "$(field name)"
    return 1
  fi
  prepare "$name" "$@"
  cd "$checkout"
  export PATH="$checkout/.venv/bin:$PATH"
  setsid bash "$here/worker.sh" supervise "$@" </dev/null >/dev/null 2>&1 &
  printf '%s\n' $! >"$job/pid"
  printf 'worker %s: started %s\n' "$me" "$name"
}

run() {
  local name=$1
  shift
  prepare "$name" "$@"
  printf '%s\n' $$ >"$job/pid"
  supervise "$@"
}

# Runs the command, passes SIGTERM on, and writes how it ended: without that,
# a finished job and a killed one would look alike.
supervise() {
  local child='' code=0 signalled='' again
  trap 'signalled=yes; [ -z "$child" ] || kill -TERM "$child" || true' TERM
  "$@" >>"$job/log" 2>&1 </dev/null &
  child=$!
  [ -z "$signalled" ] || kill -TERM "$child"
  wait "$child" || code=$?
  # A signal ends `wait` before the command has ended.
  while [ -n "$signalled" ]; do
    signalled=''
    again=0
    wait "$child" || again=$?
    [ "$again" = 127 ] || code=$again
  done
  printf '%s\n' "$code" >"$job/exit.new"
  mv "$job/exit.new" "$job/exit"
  return "$code"
}

# report NUMBER STATE BEGAN EXIT NAME LAST: absent, running, exited, stopped
# (because asked to), killed (gone without a word) or rebooted.
report() {
  local state last
  if [ ! -f "$job/pid" ]; then
    printf 'report\t%s\tabsent\t-\t-\t-\t-\n' "$(number)"
    return
  fi
  if alive; then
    state=running
  elif [ -f "$job/stopped" ] && [ "$(field exit)" != 0 ]; then
    state=stopped
  elif [ ! -f "$job/exit" ]; then
    state=killed
    [ "$(boot)" = "$(field boot)" ] || state=rebooted
  else
    state=exited
  fi
  last=$(tail -c 65536 "$job/log" | tr '\t\r' ' \n' |
    grep -a 'step [0-9]' | tail -n 1 | cut -c -200) || true
  printf 'report\t%s\t%s\t%s\t%s\t%s\t%s\n' "$(number)" "$state" \
    "$(field began)" "$(cat "$job/exit" 2>/dev/null || echo -)" \
    "$(field name)" "${last:--}"
}

follow() {
  if [ "$(field began)" != "$1" ]; then
    printf 'the log of %s is no longer here\n' "$1" >&2
    return 1
  fi
  if alive; then
    tail -c "+$(($2 + 1))" -F -s 0.5 "--pid=$(field pid)" "$job/log"
  else
    tail -c "+$(($2 + 1))" "$job/log"
  fi
}

stop() {
  local me pid waited=0
  me=$(number)
  if ! alive; then
    printf 'worker %s: nothing is running\n' "$me"
    return 0
  fi
  pid=$(field pid)
  : >"$job/stopped"
  kill -TERM "$pid" 2>/dev/null || true
  while alive; do
    if [ "$waited" -ge $(($1 * 5)) ]; then
      kill -KILL -- "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null || true
      printf 'worker %s: %s did not end within %s s: killed\n' "$me" \
        "$(field name)" "$1"
      return 0
    fi
    sleep 0.2
    waited=$((waited + 1))
  done
  printf 'worker %s: %s stopped (exit %s)\n' "$me" "$(field name)" \
    "$(field exit)"
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
  install | start | run | supervise | report | follow | stop) "$verb" "$@" ;;
  tail) tail -n "$1" "$job/log" ;;
  -h | --help | '') usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
