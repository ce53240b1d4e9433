"""The command line of tpu_pod.sh."""

from __future__ import annotations

from pod import control, local, log
from pod.cloud import Cloud
from pod.create import RetryLater, bring_up, take_down
from pod.install import install_everywhere
from pod.log import PodError, UsageError, say
from pod.settings import Settings
from pod.stage import stage_command
from pod.supervise import run_stage

_USAGE = r"""
Usage: launch/tpu_pod.sh VERB [OPTIONS] [-- ARGUMENTS OF THE PROGRAM]

Gets a TPU, puts this checkout on all its workers and runs a stage there, until
it is done: after a preemption the TPU is requested anew and the stage goes on
from its checkpoint. It runs detached: Ctrl-C here, or a lost connection, does
not end it, and the same command attaches again.

  up              request the TPU, wait until it is ready, install
  stage1|2|3      the same as far as needed, then run the stage
  eval            the same for qwenvl-eval, on the checkpoint of stage 3 or
                  --init; -- --tasks A,B and more go to it; one machine
  serve           the same for qwenvl-serve; how to reach it through ssh is said
  status          the TPU, and what each worker is doing
  logs            the end of a worker's log; --follow goes on with it
  stop            end the stage: it saves, and starts there next time; a server
                  ends what it answers
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

the server:
  --init DIR        the checkpoint (default: WORKDIR/stage3)
  --port N          on the worker and here (8000)
  --api-key-file F  the key that clients must send: copied to the worker, where
                    nobody else can read it

limits:
  --budget HOURS    of the TPU for this stage, over all restarts; then it saves
                    and stops
  --max-restarts N  default 100
  --backoff SECONDS before the first restart (60), doubled up to 30 minutes
  --grace SECONDS   how long saving may take when stopped (600)
  --queue-hours H   how long to wait in the queue for a TPU (168)
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
  launch/tpu_pod.sh serve --tpu chat --zone us-west4-a --type v5litepod-4 \
    --init gs://bucket/chat -- --slots 16
  launch/tpu_pod.sh stage2 --workdir gs://bucket/qwen-vl --zone us-west4-a \
    --type v5p-128 --dry-run -- --gin.OptimizerConfig.steps=100
  launch/tpu_pod.sh stage1 --local 2 --config quickstart/stage1.gin \
    --workdir runs/two --data runs/quickstart/data --steps=20
"""

_STAGES = ('stage1', 'stage2', 'stage3', 'eval', 'serve')
_OTHERS = {
  'status': control.show_status,
  'logs': control.show_log,
  'stop': control.stop_stage,
}


def main(arguments: list[str]) -> int:
  """Runs tpu_pod.sh; returns its exit status."""
  before = arguments[: (*arguments, '--').index('--')]
  if '--help' in before or '-h' in before:
    log.show(_USAGE.lstrip())
    return 0
  if not arguments:
    log.relay(_USAGE.lstrip(), '')
    return 2
  try:
    return _run(*arguments)
  except PodError as error:
    say(f'error: {error.lines[0]}', *error.lines[1:])
    return error.status
  except OSError as error:
    say(f'error: {error}')
    return 1
  except KeyboardInterrupt:
    return 130


def _run(verb: str, *arguments: str) -> int:
  if verb not in (*_STAGES, *_OTHERS, 'up', 'down'):
    raise UsageError(f'no such verb: {verb}')
  settings = Settings(list(arguments))
  cloud = Cloud(settings)
  if verb in _STAGES:
    command = stage_command(settings, verb)
    if settings.local is not None:
      return local.run_local(settings, verb, command)
    return run_stage(cloud, verb, command)
  settings.need_zone()
  cloud.check()
  if verb in _OTHERS:
    return _OTHERS[verb](cloud)
  if verb == 'down':
    control.check_unattended(cloud)
    take_down(cloud)
    return 0
  try:
    bring_up(cloud)
    install_everywhere(cloud)
  except RetryLater as retry:
    raise PodError(
      f'TPU {settings.tpu} did not come up: {retry.outcome}',
      'a stage would try again by itself',
    ) from retry
  return 0
