#!/usr/bin/env bash
# Stands in for the interpreter of a worker: environments are made in no time,
# and what is installed there is trainer_standin.py. On the workers that
# $STANDIN/no_space names, installing fails.
set -eu

case "$*" in
  *ensurepip*) ;;
  --version) echo 'Python 3.11.9' ;;
  '-m venv --clear '*)
    mkdir -p "$4/bin"
    ln -sf "$STANDIN/remote bin/python3.11" "$4/bin/python"
    : >"$4/bin/activate"
    ;;
  '-m pip install '*)
    echo "$*" >>"$HOME/pip"
    if grep -qsx "$WORKER" "$STANDIN/no_space"; then
      echo 'ERROR: Could not install packages: No space left on device'
      exit 1
    fi
    ln -sf "$STANDIN/remote bin/qwenvl-train" .venv/bin/qwenvl-train
    ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
