#!/usr/bin/env bash
# Runs a command in the environment of vLLM, which serves on many machines.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'TEXT'
Usage: launch/vllm.sh COMMAND [ARGUMENTS]

Makes .venv-vllm at the repository's root, or reuses it, and runs the command
there: vLLM for TPUs and this package, whose plugin it finds by itself. vLLM asks
for other versions of some packages than training does (constraints-vllm.txt),
hence an environment of its own (about 7 GB, with the CUDA libraries that PyPI's
torch wants on any machine).

  launch/vllm.sh vllm serve runs/quickstart/stage3
  launch/vllm.sh python -m pytest tests/serve/vllm_plugin

PYTHON=/path/to/python picks the interpreter (3.12: vLLM's wheel has no other).
TEXT
}

case ${1:-} in
  '' | -h | --help)
    usage
    exit 0
    ;;
esac

venv=$root/.venv-vllm
stamp=$venv/installed
wanted=$(cat "$root/setup.cfg" "$root/constraints.txt" \
  "$root/constraints-vllm.txt" | cksum)
if ! grep -qsxF "$wanted" "$stamp"; then
  python=${PYTHON:-python3.12}
  if ! "$python" -c 'import sys; assert sys.version_info[:2] == (3, 12)' \
    2>/dev/null; then
    printf 'vllm: %s is no Python 3.12; name one: PYTHON=.. launch/vllm.sh\n' \
      "$python" >&2
    exit 1
  fi
  printf 'vllm: making %s with %s\n' "$venv" "$python" >&2
  "$python" -m venv --clear "$venv"
  # constraints.txt, less what constraints-vllm.txt says otherwise.
  sed -n 's/==.*/==/p' "$root/constraints-vllm.txt" |
    grep -vhf - "$root/constraints.txt" |
    cat - "$root/constraints-vllm.txt" >"$venv/constraints.txt"
  if ! (cd "$root" && "$venv/bin/python" -m pip install --no-input --no-compile \
    -c "$venv/constraints.txt" -e . vllm-tpu pytest) \
    >"$venv/install.log" 2>&1; then
    tail -n 15 "$venv/install.log" >&2
    printf 'vllm: the installation failed; all of it: %s\n' \
      "$venv/install.log" >&2
    exit 1
  fi
  printf '%s\n' "$wanted" >"$stamp"
fi
export PATH="$venv/bin:$PATH"
exec "$@"
