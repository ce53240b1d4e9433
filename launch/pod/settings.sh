# Part of tpu_pod.sh: settings. Each is a variable QWENVL_POD_NAME, so that
# the environment can give it; an option --name goes before that, and files of
# settings come after it.
# shellcheck shell=bash disable=SC2034,SC2153  # for the other parts

readonly VALUE_OPTIONS=(
  tpu zone project type runtime-version workdir init data config topology
  budget max-restarts backoff grace ssh state local devices-per-process
  worker lines settings
)

# Words for gcloud's create, and for the program on the workers.
CREATE_FLAGS=()
EXTRA=()

_variable() {
  local name=${1^^}
  printf 'QWENVL_POD_%s\n' "${name//-/_}"
}

_is_option() {
  local option
  for option in "${VALUE_OPTIONS[@]}"; do
    [ "$option" != "$1" ] || return 0
  done
  return 1
}

# set_if_unset NAME VALUE
set_if_unset() {
  local variable
  variable=$(_variable "$1")
  if [ -z "${!variable:-}" ]; then
    printf -v "$variable" '%s' "$2"
  fi
}

# Reads options into variables, what is meant for the program into EXTRA.
parse_options() {
  local name value variable
  while [ $# -gt 0 ]; do
    case $1 in
      --)
        shift
        EXTRA+=("$@")
        return
        ;;
      --spot | --reserved | --on-demand) QWENVL_POD_CAPACITY=${1#--} ;;
      --dry-run) DRY_RUN=yes ;;
      --yes) YES=yes ;;
      --follow) FOLLOW=yes ;;
      --delete-after) QWENVL_POD_DELETE_AFTER=yes ;;
      --mount-data) QWENVL_POD_MOUNT_DATA=yes ;;
      --create-flag=*) CREATE_FLAGS+=("${1#--create-flag=}") ;;
      --gin_file=* | --gin.*=* | --steps=*) EXTRA+=("$1") ;;
      --gin_file | --gin.* | --steps)
        [ $# -gt 1 ] || usage_error "$1 has no value"
        EXTRA+=("$1" "$2")
        shift
        ;;
      --*)
        name=${1#--}
        name=${name%%=*}
        _is_option "$name" || usage_error "unknown option --$name"
        case $1 in
          *=*) value=${1#*=} ;;
          *)
            [ $# -gt 1 ] || usage_error "$1 has no value"
            value=$2
            shift
            ;;
        esac
        variable=$(_variable "$name")
        printf -v "$variable" '%s' "$value"
        ;;
      *) usage_error "unexpected argument $1 (arguments of qwenvl-train go after --)" ;;
    esac
    shift
  done
}

# Reads a file of lines `name=value` for what has not been said yet.
read_settings() {
  local file=$1 line name value number=0
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    case $line in '' | '#'*) continue ;; esac
    name=${line%%=*} value=${line#*=}
    if [ "$name" = "$line" ]; then
      die "$file line $number: '$line' is not name=value"
    elif [ "$name" = create-flag ]; then
      CREATE_FLAGS+=("$value")
    elif [ "$name" = capacity ] || _is_option "$name"; then
      set_if_unset "$name" "$value"
    else
      die "$file line $number: there is no setting '$name'" \
        "settings: ${VALUE_OPTIONS[*]} capacity create-flag"
    fi
  done <"$file"
}

# Where this machine keeps what it knows about the TPU.
state_dir() { printf '%s\n' "$QWENVL_POD_STATE/$QWENVL_POD_TPU"; }

complete_settings() {
  local file=${QWENVL_POD_SETTINGS:-}
  if [ -n "$file" ]; then
    [ -f "$file" ] || die "--settings $file does not exist"
    read_settings "$file"
  elif [ -f "$ROOT/pod.settings" ]; then
    read_settings "$ROOT/pod.settings"
  fi
  set_if_unset state "$ROOT/runs/pod"
  set_if_unset tpu "qwenvl-${USER:-$(id -un)}"
  # What the TPU was made with, so that `status` need not be told.
  if [ -f "$(state_dir)/settings" ]; then
    read_settings "$(state_dir)/settings"
  fi
  set_if_unset capacity on-demand
  set_if_unset ssh external
  set_if_unset max-restarts 100
  set_if_unset backoff 60
  set_if_unset grace 600
  set_if_unset lines 100
  set_if_unset worker 0
  set_if_unset runtime-version "$(_runtime_of "${QWENVL_POD_TYPE:-}")"
  check_settings
}

check_settings() {
  local name variable
  for name in max-restarts backoff grace lines local devices-per-process; do
    variable=$(_variable "$name")
    case ${!variable:-0} in
      *[!0-9]*) usage_error "--$name ${!variable} is not a whole number" ;;
    esac
  done
  if ! [[ ${QWENVL_POD_BUDGET:-0} =~ ^[0-9]+([.][0-9]+)?$ ]]; then
    usage_error "--budget $QWENVL_POD_BUDGET is not a number of hours"
  fi
  case $QWENVL_POD_CAPACITY in
    spot | reserved | on-demand) ;;
    *) usage_error "capacity $QWENVL_POD_CAPACITY: spot, reserved or on-demand" ;;
  esac
  case $QWENVL_POD_SSH in
    external | internal | iap) ;;
    *) usage_error "--ssh $QWENVL_POD_SSH: external, internal or iap" ;;
  esac
  if [ -n "${QWENVL_POD_TYPE:-}" ] && ! [[ $QWENVL_POD_TYPE =~ \
    ^(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]*$ ]]; then
    usage_error "--type $QWENVL_POD_TYPE: as v5litepod-256 (v5e), v5p-128, \
v6e-256 or v4-512; gcloud compute tpus accelerator-types list --zone ZONE"
  fi
  # As Cloud TPU wants it; it also names a folder.
  if ! [[ $QWENVL_POD_TPU =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]]; then
    usage_error "--tpu $QWENVL_POD_TPU: lower-case letters, digits and hyphens"
  fi
}

need_zone() {
  [ -n "${QWENVL_POD_ZONE:-}" ] || usage_error \
    "--zone is missing: the zone of TPU $QWENVL_POD_TPU, e.g. us-west4-a"
}

# remember_settings: for the next command about the same TPU.
remember_settings() {
  dry && return 0
  local name variable folder
  folder=$(state_dir)
  mkdir -p "$folder"
  for name in zone project type capacity runtime-version ssh; do
    variable=$(_variable "$name")
    [ -z "${!variable:-}" ] || printf '%s=%s\n' "$name" "${!variable}"
  done >"$folder/settings.new"
  mv "$folder/settings.new" "$folder/settings"
}

# The software of TPU VMs, https://cloud.google.com/tpu/docs/runtimes
_runtime_of() {
  case $1 in
    v6e-*) printf 'v2-alpha-tpuv6e\n' ;;
    v5p-*) printf 'v2-alpha-tpuv5\n' ;;
    v5litepod-*) printf 'v2-alpha-tpuv5-lite\n' ;;
    *) printf 'tpu-ubuntu2204-base\n' ;;
  esac
}

# chips_of TYPE: types before v5e count cores, of which a chip has two.
chips_of() {
  case $1 in
    v6e-* | v5litepod-*) printf '%s\n' "${1##*-}" ;;
    *) printf '%s\n' $((${1##*-} / 2)) ;;
  esac
}
