"""Notices that a run has left its course: a loss that jumps up and stays.

A single bad batch does no harm worth a roll-back, and a step whose loss or
gradient is not finite changes nothing (`step.train_step`). What costs a run is
a loss that stays far above what it was: then the parameters are bad, and the
way out is to go back to a checkpoint from before and to leave out the data that
led there.
"""

import dataclasses
import math
import statistics
from typing import Any

from qwenvl_jax.errors import ConfigError, QwenVLError


class DivergedError(QwenVLError):
  """The run cannot find back to a finite loss that stays where it was."""


@dataclasses.dataclass(frozen=True)
class Guard:
  """When to go back to the last good checkpoint.

  The loss of a step is high if it exceeds the mean of the last `window` steps
  that were not by `sigmas` of their standard deviations, and by `rise`.

  Attributes:
    window: steps to compare with; before there are as many, nothing is high.
    sigmas: see above.
    rise: see above; a very even loss has a tiny deviation.
    steps: so many high steps in a row are a spike.
    limit: roll-backs in a run; the next spike ends it.
  """

  window: int = 200
  sigmas: float = 6.0
  rise: float = 0.3
  steps: int = 5
  limit: int = 10

  def __post_init__(self):
    if self.window < 2 or self.steps < 1 or self.limit < 0:
      raise ConfigError(
        f'{self}: window must be at least 2, steps 1 and limit 0'
      )
    if not self.sigmas > 0 or not self.rise >= 0:
      raise ConfigError(f'{self}: sigmas must be positive, rise not negative')


@dataclasses.dataclass(frozen=True)
class SpikeReport:
  """Why to go back.

  Attributes:
    step: at which it was noticed.
    good: the last step before it.
    said: what happened, for people.
  """

  step: int
  good: int
  said: str


class LossSpikeDetector:
  """Sees the loss of every step; the same in all processes."""

  def __init__(self, guard: Guard):
    self._guard = guard
    self.rollbacks = 0
    self._losses = []
    self._high = 0

  def see(self, step: int, loss: float) -> SpikeReport | None:
    """Takes note of a step.

    Args:
      loss: mean over its labels; not finite if the step was skipped.

    Returns:
      A spike if there is one by now.
    """
    if not math.isfinite(loss):
      return None
    guard = self._guard
    if len(self._losses) == guard.window:
      mean = statistics.fmean(self._losses)
      sigma = statistics.pstdev(self._losses, mean)
      if loss > mean + max(guard.sigmas * sigma, guard.rise):
        self._high += 1
        if self._high < guard.steps:
          return None
        return SpikeReport(
          step,
          step - guard.steps,
          f'the loss stood above {mean:.4f} +- {sigma:.4f} for '
          f'{guard.steps} steps, at {loss:.4f} in step {step}',
        )
    self._high = 0
    self._losses = [*self._losses, loss][-guard.window :]
    return None

  def get_state(self) -> dict[str, Any]:
    """What a checkpoint keeps, so that a resumed run decides the same."""
    return {
      'losses': list(self._losses),
      'high': self._high,
      'rollbacks': self.rollbacks,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    self._losses = list(state['losses'])[-self._guard.window :]
    self._high = state['high']
    self.rollbacks = state['rollbacks']
