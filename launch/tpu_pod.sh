#!/usr/bin/env bash
# Trains on a TPU pod, or with --local as several processes of this machine.
set -euo pipefail

ROOT=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh VERB [OPTIONS] [-- ARGUMENTS OF qwenvl-train]

Gets a TPU, puts this checkout on all its workers and runs a stage there, until
it is done: after a preemption the TPU is requested anew and the stage goes on
from its checkpoint. It runs detached: Ctrl-C here, or a lost connection, does
not end it, and the same command attaches again.

  up              request the TPU, wait until it is ready, install
  stage1|2|3      the same as far as needed, then run the stage
  eval            the same for qwenvl-eval, on the checkpoint of stage 3
  status          the TPU, and what each worker is doing
  logs            the end of a worker's log; --follow goes on with it
  stop            end the stage: it saves, and starts there next time
  down            delete the TPU; asks first

the TPU:
  --tpu NAME              default: qwenvl-$USER; an existing one is used as is
  --zone Z, --project P   the project defaults to gcloud's
  --type TYPE             v5litepod-256 (v5e), v5p-128, v6e-256, v4-512, ...
  --spot | --reserved | --on-demand   which capacity to request (on-demand)
  --runtime-version V     default: the one for the type
  --create-flag=FLAG      a flag more for gcloud's create; may be repeated:
                          --create-flag=--network=NET
  --ssh WAY               external (default), internal (from inside the same
                          network), iap (through the Identity-Aware Proxy).
                          For several workers gcloud wants its key in an agent:
                          ssh-add ~/.ssh/google_compute_engine

the stage:
  --workdir DIR     the runs of all stages, e.g. gs://bucket/qwen-vl: stage2
                    writes DIR/stage2 and starts from DIR/stage1
  --init DIR        start from another checkpoint (stage 1: the folder that
                    qwenvl-convert init-stage1 made)
  --data DIR        the prepared data sets, gs:// or a folder on each worker
  --mount-data      read a --data in a bucket through a folder (gcsfuse)
  --config FILE     instead of configs/STAGE.gin
  --topology FILE   instead of configs/topology/ what fits --type, or none
  --gin.NAME=VALUE, --gin_file=FILE, --steps=N   go to qwenvl-train as they are

limits:
  --budget HOURS    of the TPU for this stage, over all restarts; then it saves
                    and stops
  --max-restarts N  default 100
  --backoff SECONDS before the first restart (60), doubled up to 30 minutes
  --grace SECONDS   how long saving may take when stopped (600)
  --delete-after    delete the TPU when the stage is done or has used up a limit

  --local N         run N processes on this machine instead
  --devices-per-process K   virtual CPU devices of each (1)
  --worker N, --lines N, --follow   for logs
  --settings FILE   lines name=value for any of these (default: pod.settings at
                    the repository's root); a variable QWENVL_POD_ZONE or alike
                    goes before the file, an option before both
  --state DIR       what is remembered here about TPUs (default: runs/pod)
  --yes             do not ask
  --dry-run         print the commands instead; needs no gcloud

Status: 0 done, 1 failed, 2 wrong usage, 3 budget or restarts used up, 143
stopped.

examples:
  launch/tpu_pod.sh stage2 --tpu pod1 --zone us-west4-a --type v5litepod-256 \
    --spot --workdir gs://bucket/qwen-vl --data gs://bucket/data --budget 200
  launch/tpu_pod.sh status --tpu pod1
  launch/tpu_pod.sh stage2 --workdir gs://bucket/qwen-vl --zone us-west4-a \
    --type v5p-128 --dry-run -- --gin.OptimizerConfig.steps=100
  launch/tpu_pod.sh stage1 --local 2 --config quickstart/stage1.gin \
    --workdir runs/two --data runs/quickstart/data --steps=20
TEXT
}

# shellcheck source=launch/pod/speech.sh
source "$ROOT/launch/pod/speech.sh"
# shellcheck source=launch/pod/settings.sh
source "$ROOT/launch/pod/settings.sh"
# shellcheck source=launch/pod/cloud.sh
source "$ROOT/launch/pod/cloud.sh"
# shellcheck source=launch/pod/create.sh
source "$ROOT/launch/pod/create.sh"
# shellcheck source=launch/pod/install.sh
source "$ROOT/launch/pod/install.sh"
# shellcheck source=launch/pod/stage.sh
source "$ROOT/launch/pod/stage.sh"
# shellcheck source=launch/pod/watch.sh
source "$ROOT/launch/pod/watch.sh"
# shellcheck source=launch/pod/supervise.sh
source "$ROOT/launch/pod/supervise.sh"
# shellcheck source=launch/pod/control.sh
source "$ROOT/launch/pod/control.sh"
# shellcheck source=launch/pod/local.sh
source "$ROOT/launch/pod/local.sh"

if [ "${BASH_VERSINFO[0]}" -lt 5 ]; then
  die "this is bash $BASH_VERSION; 5 or newer is needed" \
    'on a Mac: brew install bash'
fi

# What the parts share: a folder for what gcloud says, the process that
# streams, whether a stage runs, how an attempt went, the stage's command, since
# when TPU time is not yet counted. Commands of a dry run go to descriptor 3.
SCRATCH=$(mktemp -d)
STREAMER=''
RUNNING=''
OUTCOME=''
COMMAND=()
CHARGED=0
trap 'rm -rf "$SCRATCH"' EXIT
exec 3>&1

main() {
  local verb=${1:-} arg
  for arg in "$@"; do
    case $arg in
      --) break ;;
      -h | --help) usage && return ;;
    esac
  done
  [ $# -gt 0 ] || { usage >&2 && return 2; }
  shift
  case $verb in
    up | stage[123] | eval | status | logs | stop | down) ;;
    *) usage_error "no such verb: $verb" ;;
  esac
  parse_options "$@"
  complete_settings
  case $verb in
    stage[123] | eval)
      stage_command "$verb"
      if [ -n "${QWENVL_POD_LOCAL:-}" ]; then
        run_local "$verb"
      else
        run_stage "$verb"
      fi
      return
      ;;
  esac
  need_zone
  check_gcloud
  case $verb in
    up)
      if ! bring_up || ! install_everywhere; then
        die "TPU $QWENVL_POD_TPU did not come up: $OUTCOME" \
          'a stage would try again by itself'
      fi
      ;;
    status) show_status ;;
    logs) show_log ;;
    stop) stop_stage ;;
    down) take_down ;;
  esac
}

main "$@"
