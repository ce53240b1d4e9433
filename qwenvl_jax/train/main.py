"""`qwenvl-train`: one run of one stage."""

import dataclasses
import os
import sys
from collections.abc import Sequence

from qwenvl_jax import configuration, entry
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.loop import TrainConfig, train
from qwenvl_jax.train.processes import ARRIVAL, find_place, joined
from qwenvl_jax.train.profile import parse_steps
from qwenvl_jax.train.signals import Interrupted

DESCRIPTION = """
Trains one stage of Qwen-VL as a config file says.

The run's folder (--workdir) receives checkpoints/, log.jsonl, tensorboard/,
the resolved configuration (config.gin) and what opens the model again
(config.json, qwen.tiktoken). Started again with the same --workdir, a run goes
on from its newest checkpoint. SIGTERM and Ctrl-C save before they end it.

Several processes train together when each is started with the environment
variables QWENVL_COORDINATOR (HOST:PORT of process 0), QWENVL_NUM_PROCESSES and
QWENVL_PROCESS_ID (from 0), or on all workers of a TPU pod with --distributed.

Exit status: 0 done; 2 an error that is said in a line; 75 another process was
lost, start all again; 143 stopped by SIGTERM and saved (of several processes by
Ctrl-C, too), 130 by Ctrl-C.
"""

EXAMPLES = """
qwenvl-train --gin_file=stage1.gin --workdir=runs/stage1 \\
  --gin.VISION='"start"' --gin.DECODER='"start"'
qwenvl-train --gin_file=quickstart/stage2.gin --workdir=runs/again \\
  --gin.DATA='"runs/quickstart/data"' --gin.INIT='"runs/quickstart/stage1"'
qwenvl-train --gin_file=runs/again/config.gin --workdir=runs/third --steps=20
"""


def command(argv: Sequence[str]) -> int:
  """Runs `qwenvl-train`; returns the exit status.

  Raises:
    QwenVLError: bad input.
  """
  arguments = entry.parser('qwenvl-train', DESCRIPTION, EXAMPLES)
  arguments.add_argument(
    '--workdir',
    required=True,
    help="the run's folder, made if absent; or gs://BUCKET/FOLDER",
  )
  arguments.add_argument(
    '--steps',
    type=int,
    help='stop and save at this step; the learning rate keeps the schedule '
    'of the config, and the same command without it goes on',
  )
  arguments.add_argument(
    '--profile_steps',
    metavar='FIRST:LAST',
    help='capture a profiler trace of these steps (counted from 1) in '
    'WORKDIR/profile',
  )
  arguments.add_argument(
    '--distributed',
    action='store_true',
    help='this is one of several processes of a pod: find the others',
  )
  arguments.add_argument(
    '--arrival_timeout',
    type=float,
    default=ARRIVAL,
    metavar='SECONDS',
    help='how long to wait for the other processes (default: %(default)g)',
  )
  flags, bindings = entry.parse(arguments, argv, config='stage1.gin')
  if not flags.workdir:
    raise ConfigError("--workdir is empty: the current folder is '.'")
  place = find_place(os.environ, flags.distributed)
  with joined(place, flags.arrival_timeout) as coordinator:
    configuration.load(flags.gin_file, bindings)
    config = configuration.build(TrainConfig)
    if flags.profile_steps:
      steps = parse_steps(flags.profile_steps)
      config = dataclasses.replace(config, profile_steps=steps)
    try:
      train(
        config,
        flags.workdir,
        flags.steps,
        configuration.resolved(),
        coordinator,
      )
    except Interrupted as stop:
      print(stop, file=sys.stderr, flush=True)
      return 128 + stop.signum
  return 0


def main() -> int:
  """Runs `qwenvl-train` with the arguments of this process."""
  return entry.run(command)


if __name__ == '__main__':
  sys.exit(main())
