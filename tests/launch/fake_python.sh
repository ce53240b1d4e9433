#!/usr/bin/env bash
# Stands in for the interpreter of a worker: environments are made in no time,
# and what is installed there is fake_trainer.py. On the workers that
# $FAKE/no_space names, installing fails.
set -eu

case "$(basename "$0") $*" in
  'python3 '*ensurepip*) exit 1 ;;  # As TPU VMs have it.
  'python3 -m pip install --user --quiet uv') touch "$HOME/uv" ;;
  'python3 -m uv python install --quiet 3.11') test -e "$HOME/uv" ;;
  'python3 -m uv python find 3.11') echo "$FAKE/of uv/python3.11" ;;
  *ensurepip*) ;;
  *' --version') echo 'Python 3.11.9' ;;
  *' -m venv --clear '*)
    mkdir -p "$4/bin"
    ln -sf "$0" "$4/bin/python"
    : >"$4/bin/activate"
    ;;
  *' -m pip install '*)
    echo "$*" >>"$HOME/pip"
    if grep -qsx "$WORKER" "$FAKE/no_space"; then
      echo 'ERROR: Could not install packages: No space left on device'
      exit 1
    fi
    ln -sf "$FAKE/remote bin/qwenvl-train" .venv/bin/qwenvl-train
    ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
