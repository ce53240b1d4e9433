#!/usr/bin/env bash
# Trains on a TPU pod, or with --local as several processes of this machine:
# launch/pod/main.py, on any Python from 3.9 on, without installed packages.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
for python in python3 python3.13 python3.12 python3.11 python3.10 python3.9; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
    2>/dev/null; then
    exec "$python" -B -c 'import sys; sys.path[0] = sys.argv.pop(1)
from pod import main
sys.exit(main.main(sys.argv[1:]))' "$root" "$@"
  fi
done
echo 'pod: error: Python 3.9 or newer is needed, as python3' >&2
exit 1
