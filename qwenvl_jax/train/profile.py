"""A profiler trace of some steps."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.log_upload import LogUpload

FOLDER = 'profile'


def parse_steps(text: str) -> tuple[int, int]:
  """First and last step of '10:15'.

  Raises:
    ConfigError: it is not two such numbers.
  """
  first, _, last = text.partition(':')
  if first.isdigit() and last.isdigit():
    return check_steps((int(first), int(last)))
  raise ConfigError(
    f'--profile_steps={text}: write the first and the last step, e.g. '
    '--profile_steps=10:15'
  )


def check_steps(steps: tuple[int, int]) -> tuple[int, int]:
  """Raises ConfigError unless these can be a first and a last step."""
  if len(steps) != 2 or not 1 <= steps[0] <= steps[1]:
    raise ConfigError(
      f'profile_steps={steps}: steps are counted from 1, and the first comes '
      'before the last'
    )
  return steps


class Profiler:
  """Traces the steps asked for, each annotated with its number."""

  def __init__(
    self, folder: Path, steps: tuple[int, int] | None, say: Callable
  ):
    """Starts nothing yet; `say` is told where the trace is."""
    self._folder = folder
    self._steps = steps
    self._say = say
    self._tracing = False
    self._upload = None

  def step(self, number: int) -> contextlib.AbstractContextManager:
    """What a step runs under: from its data to its dispatch."""
    if self._steps and not self._tracing and number == self._steps[0]:
      folder = self._folder
      if buckets.in_bucket(folder):
        self._upload = LogUpload(folder, self._say)
        folder = self._upload.folder
      folder.mkdir(parents=True, exist_ok=True)
      jax.profiler.start_trace(folder)
      self._tracing = True
    if not self._tracing:
      return contextlib.nullcontext()
    return jax.profiler.StepTraceAnnotation('train', step_num=number)

  def after(self, number: int, metrics: Any) -> None:
    """Ends the trace with the last step, once the devices are through."""
    if self._tracing and number >= self._steps[1]:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Writes the trace, also of a run that ends before the last step."""
    if not self._tracing:
      return
    self._tracing, steps, self._steps = False, self._steps, None
    jax.profiler.stop_trace()
    if self._upload is not None:
      self._upload.close()
    self._say(
      f'profiled steps {steps[0]} to {steps[1]}: pip install xprof, then '
      f'xprof --logdir={self._folder} shows them in a browser'
    )
