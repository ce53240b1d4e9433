"""Compiles for chips that are not there, and takes a refusal for an answer."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan.topology import GIB

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': GIB, 'T': 2**40}
# Two passes of the compiler find out, in words of their own.
_NEEDED = (
  re.compile(r'[Uu]sed ([\d.]+)([KMGT]?)i?B? of [\d.]+[KMGT]?i?B? hbm'),
  re.compile(r'required for [\w ]+\(([\d.]+)([KMGT]?)\) exceeds available HBM'),
)
# The first that JAX has: the effort is several times faster, and gone in 0.12.
_LITTLE_EFFORT = {
  'jax_exec_time_optimization_effort': -1.0,
  'jax_optimization_level': 'O1',
}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says about a program, per chip.

  Attributes:
    text: the scheduled program; '' if it does not fit.
    fits: whether it can run at all.
    peak_bytes: memory at the fullest moment, or what it would need.
    argument_bytes: of that, the arguments; 0 if it does not fit.
  """

  text: str
  fits: bool
  peak_bytes: int
  argument_bytes: int


def compile_program(lowered: Any, quick: bool = False) -> Compiled:
  """Compiles; a program that does not fit is no error.

  Args:
    lowered: a `jax.stages.Lowered` for devices of a topology.
    quick: compile faster, to a schedule that nobody would run: for memory and
      FLOPs only.

  Raises:
    ConfigError: the compiler gave up for another reason.
  """
  with _little_effort() if quick else contextlib.nullcontext():
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      needed = needed_bytes(str(error))
      if needed is None:
        text = ' '.join(str(error).split())
        raise ConfigError(
          f'the compiler gave up on this program: {text[:600]}'
        ) from error
      return Compiled('', False, needed, 0)
  memory = compiled.memory_analysis()
  return Compiled(
    compiled.as_text(),
    True,
    memory.peak_memory_in_bytes,
    memory.argument_size_in_bytes,
  )


@contextlib.contextmanager
def _little_effort() -> Iterator[None]:
  name = next(name for name in _LITTLE_EFFORT if name in jax.config.values)
  before = jax.config.values[name]
  jax.config.update(name, _LITTLE_EFFORT[name])
  try:
    yield
  finally:
    jax.config.update(name, before)


def needed_bytes(message: str) -> int | None:
  """What a program would need, from the compiler's complaint.

  >>> needed_bytes('Ran out of memory: Used 25.0G of 15.75G hbm.')
  26843545600
  """
  for pattern in _NEEDED:
    match = pattern.search(message)
    if match:
      return int(float(match[1]) * _UNITS[match[2]])
  return None
