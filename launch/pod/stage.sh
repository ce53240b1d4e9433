# Part of tpu_pod.sh: the command that every process of a stage runs.
# shellcheck shell=bash

# stage_command STAGE fills COMMAND. --workdir holds the runs of all stages:
# a stage starts from its predecessor's run beside its own, or --init.
stage_command() {
  local stage=$1 runs=${QWENVL_POD_WORKDIR:-} init=${QWENVL_POD_INIT:-}
  [ -n "$runs" ] || usage_error \
    "--workdir is missing: the folder of the runs, e.g. gs://bucket/qwen-vl"
  runs=${runs%/}
  if [ "$stage" = eval ]; then
    _eval_command "$runs"
    return
  fi
  COMMAND=(qwenvl-train "--gin_file=${QWENVL_POD_CONFIG:-configs/$stage.gin}")
  _add_topology "$stage"
  COMMAND+=("--workdir=$runs/$stage")
  case $stage in
    stage1)
      if [ -n "$init" ]; then
        COMMAND+=(
          "--gin.VISION=$(_gin_string "$init")"
          "--gin.DECODER=$(_gin_string "$init")"
        )
      elif [ -z "${QWENVL_POD_CONFIG:-}" ] &&
        [[ " ${EXTRA[*]}" != *' --gin.'* ]]; then
        usage_error 'stage1 needs --init DIR, made by: qwenvl-convert init-stage1'
      fi
      ;;
    stage2) init=${init:-$runs/stage1} ;;&
    stage3) init=${init:-$runs/stage2} ;;&
    *) COMMAND+=("--gin.INIT=$(_gin_string "$init")") ;;
  esac
  if [ -n "${QWENVL_POD_DATA:-}" ]; then
    COMMAND+=("--gin.DATA=$(_gin_string "$(_data_dir)")")
  fi
}

# Where a worker finds the data: worker.sh makes a folder of mount://BUCKET.
_data_dir() {
  case ${QWENVL_POD_MOUNT_DATA:+mount}:$QWENVL_POD_DATA in
    mount:gs://*) printf 'mount://%s\n' "${QWENVL_POD_DATA#gs://}" ;;
    *) printf '%s\n' "$QWENVL_POD_DATA" ;;
  esac
}

# The answer of a command line that scores a checkpoint on benchmarks.
_eval_command() {
  grep -q '^ *qwenvl-eval *=' "$ROOT/setup.cfg" || die \
    'this checkout has no command qwenvl-eval yet, which eval would run'
  COMMAND=(
    qwenvl-eval "--checkpoint=${QWENVL_POD_INIT:-$1/stage3}"
    "--output=$1/eval"
  )
}

# The config of how a stage uses this kind of pod, if the project has one: of the
# stage's config, or of all.
_add_topology() {
  local file folder config=${QWENVL_POD_CONFIG:-$1}
  case ${QWENVL_POD_TOPOLOGY:-} in
    none) return ;;
    ?*)
      COMMAND+=("--gin_file=$QWENVL_POD_TOPOLOGY")
      return
      ;;
  esac
  # Processes of --local are no pod.
  [ -z "${QWENVL_POD_LOCAL:-}" ] && [ -n "${QWENVL_POD_TYPE:-}" ] || return 0
  folder=configs/topology/$(topology_of "$QWENVL_POD_TYPE")
  config=${config##*/}
  for file in "$folder/${config%.gin}.gin" "$folder/mesh.gin"; do
    if [ -f "$ROOT/$file" ]; then
      COMMAND+=("--gin_file=$file")
      return
    fi
  done
  say "there is no $folder: the mesh is that of configs/train.gin"
}

# topology_of v5litepod-256 -> v5e_256: generation and chips.
topology_of() {
  local generation=${1%-*}
  printf '%s_%s\n' "${generation/v5litepod/v5e}" "$(chips_of "$1")"
}

# A path as a Python string.
_gin_string() {
  local text=${1//\\/\\\\}
  printf '"%s"\n' "${text//\"/\\\"}"
}
