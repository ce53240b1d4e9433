# Part of tpu_pod.sh: talking, quoting, telling the time.
# shellcheck shell=bash

say() { printf 'pod: %s\n' "$*" >&2; }

# die MESSAGE [REMEDY...] ends with status 1, a line an argument.
die() {
  say "error: $1"
  shift
  local line
  for line in "$@"; do
    printf '     %s\n' "$line" >&2
  done
  exit 1
}

usage_error() {
  say "error: $1"
  printf '     see launch/tpu_pod.sh --help\n' >&2
  exit 2
}

# Prints its arguments as any POSIX shell reads them back.
quote() {
  local arg out=''
  for arg in "$@"; do
    case $arg in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) arg="'${arg//\'/\'\\\'\'}'" ;;
    esac
    out+="${out:+ }$arg"
  done
  printf '%s\n' "$out"
}

dry() { [ -n "${DRY_RUN:-}" ]; }

# Seconds since 1970. Tests let the clock of this script run faster than real
# time: everything here that waits or counts goes by `now` and `pause`.
now() {
  local micro=${EPOCHREALTIME/[.,]/}
  printf '%s\n' $((micro * ${QWENVL_POD_SPEEDUP:-1} / 1000000))
}

pause() {
  dry && return 0
  local ms=$(($1 * 1000 / ${QWENVL_POD_SPEEDUP:-1}))
  sleep "$((ms / 1000)).$(printf '%03d' $((ms % 1000)))"
}

# 3725 -> 1:02:05
duration() {
  printf '%d:%02d:%02d\n' $(($1 / 3600)) $(($1 / 60 % 60)) $(($1 % 60))
}
