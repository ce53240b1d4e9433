"""Hostile configurations: values of overrides, and config files."""

import functools
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

from qwenvl_jax import configuration
from qwenvl_jax.errors import ConfigError, QwenVLError
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.optimizer import OptimizerConfig

_RUN = """from __gin__ import dynamic_registration

from qwenvl_jax.train import checkpoint
from qwenvl_jax.train import guard
from qwenvl_jax.train import optimizer

PEAK = 1e-3
STEPS = 100

checkpoint.CheckpointConfig.every = 3
guard.Guard:
  window = 20
  sigmas = 6.0
optimizer.OptimizerConfig:
  peak = %PEAK
  end = 1e-5
  warmup = 10
  steps = %STEPS
  rates = {'vision/.*': 0.1}
  trainable = ('adapter/.*', 'decoder/.*')
"""

_NAMES = [
  *('PEAK', 'STEPS', 'optimizer.OptimizerConfig', 'OptimizerConfig.peak'),
  *('OptimizerConfig.trainable', 'OptimizerConfig.rates', 'gin.macro'),
  *('OptimizerConfig.warmup', 'a/OptimizerConfig.end', 'Guard.window', ''),
  *('OptimizerConfig', '.', 'optimizer.re.compile', '__class__', 'a.b.c.d'),
]
_PIECES = [
  *('1', '-1', '0.5', '1e999', '10**10', "'1e-4'", '"x"', 'None', 'True'),
  *('[', ']', '(', ')', '{', '}', ',', ':', '%', '@', '=', '-', '\\', '\n'),
  *('%PEAK', '%STEPS', '%gin.REQUIRED', '@optimizer.OptimizerConfig()'),
  *('@optimizer.re.compile()', '@os.system()', '#', '"""', "'", '\x1b[31m'),
  *('\x00', '\ufeff', 'é', '9' * 5000, '0x10', '1_0', '1j', 'nan', 'fp16'),
  *('include "run.gin"', 'import os', 'from os import path', '  ', '\t'),
]
_TYPES = [
  *(4.0, -1, 10**10, 2**64, '1e-4', 'fp16', None, True, (), [], {}, '', -0.0),
  *(1e-320, 1e308, 'a' * 1000, [[[]]], {'a': {'b': 1}}, (1, 'a'), {1: 2}),
]


def _build(folder: Path, file: str, *bindings: str) -> str:
  before = os.getcwd()
  os.chdir(folder)
  try:
    configuration.load([file], bindings)
    configuration.resolved()
    configuration.build(OptimizerConfig, whole=False)
    return 'accepted'
  except QwenVLError as error:
    assert str(error)
    return 'handled'
  finally:
    os.chdir(before)


def _run_file(folder: Path) -> None:
  (folder / 'run.gin').write_text(_RUN)


def override_text(rng: random.Random, folder: Path) -> str:
  """An override whose name and value are pieces of the language."""
  _run_file(folder)
  value = ''.join(rng.choices(_PIECES, k=rng.randint(1, 6)))
  return _build(folder, 'run.gin', f'{rng.choice(_NAMES)}={value}')


def value_type(rng: random.Random, folder: Path) -> str:
  """A stage in which one parameter is a literal of another type."""
  lines = list(_stage())
  chosen = rng.choice([i for i, x in enumerate(lines) if ' = ' in x])
  name = lines[chosen].partition(' = ')[0]
  lines[chosen] = f'{name} = {rng.choice(_TYPES)!r}'
  (folder / 'run.gin').write_text('\n'.join(lines))
  try:
    configuration.load([str(folder / 'run.gin')])
    configuration.build(TrainConfig)
    return 'accepted'
  except QwenVLError as error:
    assert str(error)
    return 'handled'


@functools.cache
def _stage() -> tuple[str, ...]:
  """Lines of a stage, all bindings on a line each."""
  configuration.load(['stage3.gin'], ("INIT='x'", 'STREAMS=[]'))
  text = re.sub(r' = \\\n\s+', ' = ', configuration.resolved())
  return tuple(
    line
    for line in re.sub(r'\n\s+', ' ', text).splitlines()
    # What depends on data that are not there is not made.
    if line and line[0] != '#' and not line.startswith('mixture.streams')
  )


def file_bytes(rng: random.Random, folder: Path) -> str:
  """A config file with bytes flipped, cut, repeated or put in."""
  data = bytearray(_RUN.encode())
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(len(data) or 1)
    kind = rng.randrange(5)
    if kind == 0 and data:
      data[at] = rng.randrange(256)
    elif kind == 1:
      del data[at : at + rng.randint(1, 40)]
    elif kind == 2:
      data[at:at] = data[at : at + rng.randint(1, 60)]
    elif kind == 3:
      data[at:at] = rng.choice(_PIECES).encode()
    else:
      data = data[: at + 1]
  (folder / 'run.gin').write_bytes(data)
  return _build(folder, 'run.gin')


def file_lines(rng: random.Random, folder: Path) -> str:
  """A config file whose lines are shuffled, and includes in between."""
  lines = _RUN.splitlines()
  for _ in range(rng.randint(1, 6)):
    lines.insert(
      rng.randrange(len(lines)),
      rng.choice(
        [
          "include 'run.gin'",
          "include 'other.gin'",
          'import subprocess',
          'from qwenvl_jax import buckets',
          'from qwenvl_jax.train import loop as optimizer',
          'PEAK = %STEPS',
          'STEPS = [%PEAK, %STEPS]',
          'optimizer.OptimizerConfig.rates = @optimizer.OptimizerConfig()',
          'a/optimizer.OptimizerConfig.peak = 1',
          '    warmup = 1',
        ]
      ),
    )
  if rng.random() < 0.5:
    rng.shuffle(lines)
  (folder / 'run.gin').write_text('\n'.join(lines))
  (folder / 'other.gin').write_text(rng.choice(["include 'run.gin'", _RUN, '']))
  return _build(folder, 'run.gin')


def nested(rng: random.Random, folder: Path) -> str:
  """Values nested deeply, or that grow by being named twice."""
  depth = rng.choice([3, 50, 500, 5_000])
  opening, closing = (
    rng.choice(['()', '[]', '{}', '((', '[(', '{1:'][:3]) or '()'
  )
  value = opening * depth + '1' + closing * depth
  names = [f'N{i} = [%N{i + 1}, %N{i + 1}]' for i in range(rng.randint(1, 40))]
  text = rng.choice(
    [f'A = {value}', '\n'.join([*names, f'N{len(names)} = {value[:40]}'])]
  )
  (folder / 'run.gin').write_text(f'{_RUN}\n{text}\n')
  return _build(folder, 'run.gin')


def name(rng: random.Random, folder: Path) -> str:
  """A name of a config file that is none."""
  parts = ['..', '/', 'a', '\x00', '~', 'gs:', '//', '\x1b', 'x' * 300, '.gin']
  _run_file(folder)
  text = ''.join(rng.choices(parts, k=rng.randint(0, 8)))
  try:
    if text.startswith('gs://'):
      raise ConfigError('a bucket is asked for elsewhere')
    return _build(folder, text)
  except ConfigError:
    return 'handled'


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
  function.__name__: function
  for function in (
    override_text,
    value_type,
    file_bytes,
    file_lines,
    nested,
    name,
  )
}
