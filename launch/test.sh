#!/usr/bin/env bash
# Runs the tests, making the environment first if need be.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'TEXT'
Usage: launch/test.sh [--fast | --pods] [PYTEST ARGUMENTS]

  --fast   leave out the tests marked slow (those over about ten seconds)
  --pods   only those that compile whole stages for their pods (minutes each)
  --help   this text

Everything else goes to pytest; paths count from the repository's root:
  launch/test.sh tests/model -k rope -x
Without, the tests run in a process for each core, four at most; -n 1 is one.
TEXT
}

# One file's tests stay in one process: they share what is dear to make.
cores=$(getconf _NPROCESSORS_ONLN)
parallel=(-n "$((cores < 4 ? cores : 4))" --dist loadfile)
args=()
for arg in "$@"; do
  case $arg in
    --fast) args+=(-m 'not slow and not pods') ;;
    # A stage takes gigabytes to compile.
    --pods)
      args+=(-m pods)
      parallel=()
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      args+=("$arg")
      parallel=()
      ;;
  esac
done

# Plans are compiled by libtpu, buckets are played by a server here, and the
# server has a page.
export EXTRAS=${EXTRAS:-demo,dev,gcs,plan}
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
cd "$root"
exec python -m pytest "${parallel[@]+"${parallel[@]}"}" \
  "${args[@]+"${args[@]}"}"
