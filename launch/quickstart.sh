#!/usr/bin/env bash
# Trains a small Qwen-VL through its three stages and reports what it learned.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'TEXT'
Usage: launch/quickstart.sh [--smoke] [--out DIR] [OPTIONS]

Makes the environment, composes pictures, trains a small decoder on text, then
the three stages of Qwen-VL, and evaluates on pictures never seen: about 25
minutes on two CPU cores. Writes one folder with the checkpoints and
report.html.

  --out DIR   the folder to write (default: runs/quickstart at the repository's
              root, runs/smoke with --smoke)
  --smoke     a few steps of everything in a few minutes: does it run at all?
  --help      this text, and the options of python -m qwenvl_jax.quickstart
TEXT
}

out=$root/runs/quickstart
for arg in "$@"; do
  case $arg in
    --smoke) out=$root/runs/smoke ;;
    -h | --help)
      usage
      if [ ! -x "$root/.venv/bin/python" ]; then
        exit 0
      fi
      printf '\n'
      ;;
  esac
done

# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
# Where libtpu is installed (for plans) and no TPU is there, it would complain.
export JAX_PLATFORMS=cpu
# Not from the root: a relative DIR counts from where the caller stands. Given
# twice, the last --out wins.
exec python -m qwenvl_jax.quickstart --out "$out" "$@"
