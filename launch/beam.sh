#!/usr/bin/env bash
# Runs a command in the environment of Apache Beam, which cleaning needs.
set -euo pipefail

root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'TEXT'
Usage: launch/beam.sh COMMAND [ARGUMENTS]

Makes .venv-beam at the repository's root, or reuses it, and runs the command
there. Apache Beam asks for older versions of some packages than training does
(constraints-beam.txt), hence an environment of its own (about 1.5 GB).

  launch/beam.sh qwenvl-data clean --help
  launch/beam.sh python -m pytest tests/data/cleaning

PYTHON=/path/to/python picks the interpreter (3.11 or newer).
TEXT
}

case ${1:-} in
  '' | -h | --help)
    usage
    exit 0
    ;;
esac

venv=$root/.venv-beam
stamp=$venv/installed
wanted=$(cat "$root/setup.cfg" "$root/constraints.txt" \
  "$root/constraints-beam.txt" | cksum)
if ! grep -qsxF "$wanted" "$stamp"; then
  python=${PYTHON:-$(command -v python3.11 || command -v python3)}
  printf 'beam: making %s with %s\n' "$venv" "$python" >&2
  "$python" -m venv --clear "$venv"
  # constraints.txt, less what constraints-beam.txt says otherwise.
  sed -n 's/==.*/==/p' "$root/constraints-beam.txt" |
    grep -vhf - "$root/constraints.txt" |
    cat - "$root/constraints-beam.txt" >"$venv/constraints.txt"
  if ! (cd "$root" && "$venv/bin/python" -m pip install --no-input \
    -c "$venv/constraints.txt" -e '.[clean]' pytest) \
    >"$venv/install.log" 2>&1; then
    tail -n 15 "$venv/install.log" >&2
    printf 'beam: the installation failed; all of it: %s\n' \
      "$venv/install.log" >&2
    exit 1
  fi
  printf '%s\n' "$wanted" >"$stamp"
fi
export PATH="$venv/bin:$PATH"
exec "$@"
