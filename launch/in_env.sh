#!/usr/bin/env bash
# Runs a command in an environment of its own, with other versions of packages.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'TEXT'
Usage: launch/in_env.sh NAME COMMAND [ARGUMENTS]

Makes .venv-NAME at the repository's root, or reuses it, and runs the command
there. It has the versions of constraints.txt, but for those that
constraints-NAME.txt says otherwise. NAME is one of

  beam    Apache Beam, for cleaning; Python 3.11 or newer, 1.5 GB
  vllm    vLLM for TPUs, and the plugin that it finds by itself; Python 3.12,
          7 GB with the CUDA libraries that PyPI's torch wants on any machine
  newest  the newest JAX and Flax, with all that the tests need; Python 3.12 or
          newer, 2.5 GB

  launch/in_env.sh beam qwenvl-data clean --help
  launch/in_env.sh vllm vllm serve runs/quickstart/stage3
  launch/in_env.sh newest python -m pytest -m 'not slow and not pods'

PYTHON=/path/to/python picks the interpreter. Where none will do, the status is
77; otherwise it is COMMAND's, 1 if the environment cannot be made, 2 for a
mistaken call.
TEXT
}

name=${1:-}
case $name in
  beam) oldest=11 newest=13 packages=(-e '.[clean]' pytest) ;;
  vllm) oldest=12 newest=12 packages=(-e . vllm-tpu pytest) ;;
  newest) oldest=12 newest=13 packages=(-e '.[demo,dev,gcs,plan]') ;;
  '' | -h | --help)
    usage
    exit 0
    ;;
  *)
    printf 'in_env: %s is none of beam, vllm, newest\n' "$name" >&2
    exit 2
    ;;
esac
shift
if [ $# = 0 ]; then
  printf 'in_env: no command is given; see launch/in_env.sh --help\n' >&2
  exit 2
fi
venv=$root/.venv-$name
constraints=$root/constraints-$name.txt
suits() {
  "$1" -c "import ensurepip, sys, venv
sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, $newest))" 2>/dev/null
}
find_python() {
  # Oldest first, as constraints.txt was resolved for it; the newest first for
  # the newest packages. pyenv's commands start the version that is chosen, its
  # folders any.
  local minor candidate candidates=() minors
  minors=$(seq "$oldest" "$newest")
  [ "$name" != newest ] || minors=$(seq "$newest" -1 "$oldest")
  for minor in $minors; do
    candidates+=(
      "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python3
    )
  done
  candidates+=(python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if suits "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  printf 'in_env: %s wants Python 3.%s to 3.%s with venv and ensurepip, and none was found; name one: PYTHON=/path/to/python launch/in_env.sh %s ..\n' \
    "$name" "$oldest" "$newest" "$name" >&2
  exit 77
}
install() {
  # Within a condition, a step that fails does not end it by itself.
  (
    cd "$root" &&
      "$venv/bin/python" -m pip install --no-input --no-compile \
        -c "$venv/constraints.txt" "${packages[@]}" &&
      case $name in
        newest)
          "$venv/bin/python" -m pip install --no-input --no-deps \
            -c "$venv/constraints.txt" -r launch/demo-requirements.txt
          ;;
      esac
  ) >"$venv/install.log" 2>&1
}

wanted=$(cat "$root/setup.cfg" "$root/constraints.txt" "$constraints" | cksum)
if ! grep -qsxF "$wanted" "$venv/installed"; then
  python=$(find_python)
  printf 'in_env: making %s with %s (minutes; log: %s)\n' \
    "$venv" "$python" "$venv/install.log" >&2
  "$python" -m venv --clear "$venv"
  # constraints.txt, less what the other file says otherwise.
  sed -n 's/==.*/==/p' "$constraints" |
    grep -vhf - "$root/constraints.txt" |
    cat - "$constraints" >"$venv/constraints.txt"
  # Twice, for gigabytes come over the network; what came the first time is kept.
  if ! install && ! install; then
    tail -n 15 "$venv/install.log" >&2
    printf 'in_env: the installation failed; all of it: %s\n' \
      "$venv/install.log" >&2
    exit 1
  fi
  printf '%s\n' "$wanted" >"$venv/installed"
fi
export PATH="$venv/bin:$PATH"
exec "$@"
