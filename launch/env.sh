#!/usr/bin/env bash
# Makes the project's environment, or reuses it:
#
#   source launch/env.sh    activates it in this shell
#   launch/env.sh           only makes sure that it is there
#
# Everything goes into `.venv` at the repository's root: nothing is installed
# system-wide and root is not needed. PYTHON=/path/to/python picks the
# interpreter (3.11 or newer) for a new environment, EXTRAS=tpu,torch what
# setup.cfg calls extras (without it: dev); those that are there already stay.

# A sourced script must leave the caller's shell options alone, so that every
# step here says what happens when it fails.

_qwenvl_say() { printf 'env: %s\n' "$*" >&2; }

_qwenvl_usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    >/dev/null 2>&1
}

# Prints the interpreter to make the environment with. 3.11 comes first because
# constraints.txt was resolved for it.
_qwenvl_find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    if _qwenvl_usable "$PYTHON"; then
      printf '%s\n' "$PYTHON"
      return 0
    fi
    _qwenvl_say "PYTHON=$PYTHON is not a Python 3.11 or newer with venv and pip"
    return 1
  fi
  for candidate in python3.11 python3.12 python3.13 python3 python \
    /usr/bin/python3.11 /usr/bin/python3.12 /usr/bin/python3.13; do
    if _qwenvl_usable "$candidate"; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  _qwenvl_say 'no Python 3.11 or newer with venv and ensurepip was found.'
  _qwenvl_say 'Install one (Debian, Ubuntu: python3.11 and python3.11-venv),' \
    'or name it: PYTHON=/path/to/python3.11 launch/env.sh'
  return 1
}

# Prints what the installation depends on; its last word is all extras, wanted
# or there already.
_qwenvl_stamp() {
  "$1/.venv/bin/python" - "$1" "${EXTRAS:-dev}" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256()
files = 'setup.cfg', 'pyproject.toml', 'constraints.txt'
for name in (*files, 'launch/demo-requirements.txt'):
  digest.update((root / name).read_bytes())
extras = set(sys.argv[2].split(','))
stamp = root / '.venv' / 'installed'
if stamp.exists():
  extras.update(*(x.split(',') for x in stamp.read_text().split()[2:3]))
print(sys.version.split()[0], digest.hexdigest(), ','.join(sorted(extras)))
PY
}

_qwenvl_install() {
  local root=$1 extras=$2 log=$1/.venv/install.log
  _qwenvl_say 'installing the packages of setup.cfg as pinned in' \
    'constraints.txt (about 2 GB, a minute or two);' "log: $log"
  if (
    cd "$root" &&
      .venv/bin/python -m pip install --no-input -c constraints.txt \
        -e ".[$extras]" &&
      case ,$extras, in
        *,demo,*)
          .venv/bin/python -m pip install --no-input --no-deps \
            -c constraints.txt -r launch/demo-requirements.txt
          ;;
      esac
  ) >"$log" 2>&1; then
    return 0
  fi
  tail -n 15 "$log" >&2
  _qwenvl_say "the installation failed (last lines above, all of it in $log)."
  _qwenvl_say 'Check the network, the free disk space, and pip' \
    '(.venv/bin/python -m pip --version), then run launch/env.sh again.'
  return 1
}

_qwenvl_env() {
  local root=$1 stamp=$1/.venv/installed python wanted
  # Anew if its interpreter is gone (the system's was upgraded) or if it came
  # from another folder: an environment does not survive being moved.
  if ! _qwenvl_usable "$root/.venv/bin/python" ||
    { [ -f "$stamp" ] && ! grep -qxF "root=$root" "$stamp"; }; then
    python=$(_qwenvl_find_python) || return 1
    _qwenvl_say "making $root/.venv with $python ($("$python" --version))"
    if ! "$python" -m venv --clear "$root/.venv"; then
      _qwenvl_say "could not make $root/.venv: is the folder writable?"
      return 1
    fi
  fi
  wanted=$(_qwenvl_stamp "$root") || return 1
  if ! grep -qsxF "$wanted" "$stamp"; then
    _qwenvl_install "$root" "${wanted##* }" || return 1
    printf '%s\nroot=%s\n' "$wanted" "$root" >"$stamp" || return 1
    _qwenvl_say "ready: $root/.venv"
  fi
  # Large arrays in huge pages, where glibc has them: with small ones, a fifth
  # of training on a CPU goes into mapping them (benchmarks/cpu_training.py).
  case ${GLIBC_TUNABLES:-} in
    *glibc.malloc.hugetlb=*) ;;
    *)
      GLIBC_TUNABLES=${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1
      export GLIBC_TUNABLES
      ;;
  esac
  # shellcheck disable=SC1091  # made above
  . "$root/.venv/bin/activate"
}

# BASH_SOURCE is empty in zsh, where $0 names the sourced file.
_qwenvl_root=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd -P)
_qwenvl_env "$_qwenvl_root"
_qwenvl_status=$?
unset _qwenvl_root
unset -f _qwenvl_say _qwenvl_usable _qwenvl_find_python _qwenvl_stamp \
  _qwenvl_install _qwenvl_env
# The status of `source`, and of the script when executed.
(exit "$_qwenvl_status")
