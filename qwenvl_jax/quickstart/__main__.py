"""The quickstart: all three stages, evaluation and a report, made for a CPU.

Every step runs the command that a user would run, and prints it. Finished steps
are not repeated: a run that was interrupted goes on where it stopped.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import jax

from qwenvl_jax import entry
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.quickstart import evaluate, origin
from qwenvl_jax.quickstart.phases import Phases

# Stage to (config, where its parameters come from: option to stage).
STAGES = {
  'decoder': {},
  'vision': {},
  'stage1': {'vision': 'vision', 'decoder': 'decoder'},
  'stage2': {'params': 'stage1'},
  'stage3': {'params': 'stage2'},
}

# XLA's own matrix products: a tenth faster than YNNPACK's at these sizes.
_XLA_FLAGS = '--xla_cpu_experimental_ynn_fusion_type='

# Of a finished stage: how many seconds it took.
_FINISHED = 'finished'

_SMOKE_STEPS = 6
_SMOKE_SCENES = 12
_SCENES = 500


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the command line says.

  Attributes:
    out: receives everything.
    smoke: a few steps of everything, to see that all parts work.
    platform: JAX's name of what to train on.
  """

  out: Path
  smoke: bool
  platform: str


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  again = 'interrupted; the same command goes on from here'
  return entry.run(_run, argv, interrupted=again)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='quickstart.sh',
    description='Trains a small Qwen-VL through its three stages on composed '
    'scenes, evaluates it on held-out ones and writes report.html. About 25 '
    'minutes on two CPU cores.',
  )
  parser.add_argument(
    '--out',
    type=Path,
    default=Path('runs/quickstart'),
    help='folder for data, checkpoints and report (default: %(default)s)',
  )
  parser.add_argument(
    '--smoke',
    action='store_true',
    help='a few steps of everything, to see that all parts work; the model '
    'learns nothing',
  )
  parser.add_argument(
    '--platform',
    choices=('cpu', 'tpu', 'cuda'),
    default='cpu',
    help='what to train on (default: %(default)s)',
  )
  return parser


def _devices() -> int:
  """How many to split a batch over: a power of two, a core each, at most 8."""
  cores = min(origin.cores(), 8)
  return 1 << (cores.bit_length() - 1)


def _run(argv: Sequence[str]) -> int:
  args = _parser().parse_args(argv)
  settings = Settings(args.out.resolve(), args.smoke, args.platform)
  use_platform(settings.platform)
  began = time.monotonic()
  out = settings.out
  # How long a few steps take, or another platform, is not known before.
  phases = Phases(
    ('data', *STAGES, 'evaluation'),
    estimated=not settings.smoke and settings.platform == 'cpu',
  )
  seconds = make(settings, STAGES, phases)
  phases.begin('evaluation')
  floors_met = evaluate.evaluate(
    out,
    list(STAGES),
    seconds,
    config='small' if settings.smoke else 'default',
    scenes_count=_SMOKE_SCENES if settings.smoke else _SCENES,
  )
  print(f'evaluation: {phases.end("evaluation"):.0f} s')
  minutes = (time.monotonic() - began) / 60
  print(f'\nall in {minutes:.1f} minutes')
  print(f'report:     {out / "report.html"}')
  print(f'checkpoint: {out / "stage3"}')
  print(
    'chat:       qwenvl-chat '
    f'--checkpoint {shlex.quote(str(out / "stage3"))} '
    f'--image {shlex.quote(str(out / "example.png"))}'
  )
  print(
    f'serve:      qwenvl-serve --checkpoint {shlex.quote(str(out / "stage3"))}'
  )
  if not floors_met and not settings.smoke:
    print('some scores are below their floor: see the report')
  return 0


def use_platform(name: str) -> None:
  """Says what to compute on, to this process and to its commands."""
  # JAX wants a CPU beside what it computes on.
  platforms = ','.join(dict.fromkeys((name, 'cpu')))
  os.environ['JAX_PLATFORMS'] = platforms
  jax.config.update('jax_platforms', platforms)


def make(
  settings: Settings, stages: Collection[str], phases: Phases
) -> dict[str, float]:
  """Prepares the data and trains stages that are not there yet, in order.

  Returns:
    How many seconds each took, as far as that is known.
  """
  out = settings.out
  seconds = {}
  data = out / 'data'
  for stage in stages:
    if finished(out / stage):
      phases.skip(stage)
  if (data / 'qwen.tiktoken').exists():
    phases.skip('data')
  else:
    phases.begin('data')
    command(
      'qwenvl_jax.data.cli',
      'prepare',
      'scenes',
      f'--config={"small" if settings.smoke else "default"}',
      f'--data_dir={data}',
    )
    seconds['data'] = phases.end('data')
  for stage in stages:
    if finished(out / stage):
      print(f'{stage}: finished before, in {out / stage}')
      if took := (out / stage / _FINISHED).read_text():
        seconds[stage] = float(took)
      continue
    phases.begin(stage)
    _train(settings, stage, STAGES[stage])
    seconds[stage] = phases.end(stage)
    mark_finished(out / stage, seconds[stage])
  return seconds


def _train(settings: Settings, stage: str, sources: dict[str, str]) -> None:
  out = settings.out
  options = [
    f'--gin_file=quickstart/{stage}.gin',
    f'--workdir={out / stage}',
    f'--gin.DATA={quoted(out / "data")}',
  ]
  for part, source in sources.items():
    options.append(f'--gin.InitFrom.{part}={quoted(out / source)}')
  if settings.smoke:
    options += [
      '--gin.Scenes.config="small"',
      f'--gin.OptimizerConfig.steps={_SMOKE_STEPS}',
      '--gin.OptimizerConfig.warmup=1',
    ]
  on_cpu = settings.platform == 'cpu'
  command(
    'qwenvl_jax.train.main',
    *options,
    **(training_environment() if on_cpu else {}),
  )


def training_environment() -> dict[str, str]:
  """Variables that make training on a CPU fast (benchmarks/cpu_training.py)."""
  return {
    'JAX_NUM_CPU_DEVICES': str(_devices()),
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {_XLA_FLAGS}'.strip(),
  }


def quoted(path: Path) -> str:
  """A path as a value of `--gin.NAME=VALUE`."""
  return json.dumps(str(path), ensure_ascii=False)


def command(module: str, *arguments: str, **environment: str) -> None:
  """Runs a module as a process of its own.

  Raises:
    ConfigError: it failed; it has said why.
  """
  print(f'\n$ python -m {module} {shlex.join(arguments)}', flush=True)
  done = subprocess.run(
    [sys.executable, '-m', module, *arguments],
    env=os.environ | environment,
  )
  if done.returncode:
    raise ConfigError(
      f'{module} failed with status {done.returncode}, see above; the same '
      'command goes on from here'
    )


def finished(run: Path) -> bool:
  """Whether a step was marked so."""
  return (run / _FINISHED).exists()


def mark_finished(run: Path, seconds: float) -> None:
  """Marks a step, so that it is not repeated, with the seconds it took."""
  (run / _FINISHED).write_text(f'{seconds:.1f}')


if __name__ == '__main__':
  sys.exit(main())
