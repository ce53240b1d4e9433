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


def compile_program(lowered: Any, effort: float = 0.0) -> Compiled:
  """Compiles; a program that does not fit is no error.

  Args:
    lowered: a `jax.stages.Lowered` for devices of a topology.
    effort: -1 compiles several times faster, with a schedule that nobody
      would run: for memory and FLOPs only. 0 is the default.

  Raises:
    ConfigError: the compiler gave up for another reason.
  """
  with _effort(effort):
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
def _effort(effort: float) -> Iterator[None]:
  name = 'jax_exec_time_optimization_effort'
  before = jax.config.values[name]
  jax.config.update(name, effort)
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
