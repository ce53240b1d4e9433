"""The best state of a run by one measure, kept in a folder of its own.

`WORKDIR/best` opens as a run does: `best/checkpoints/STEP` has the parameters
and the measure, saved as checkpoints are (`SavedSteps`), so that a crash leaves
the best state before or the new one. `best/best.json` says which it is.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from qwenvl_jax import buckets
from qwenvl_jax.conversion.checkpoint_io import CHECKPOINTS
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.train.checkpoint import save_args
from qwenvl_jax.train.coordinator import Coordinator
from qwenvl_jax.train.saved_steps import SavedSteps

FOLDER = 'best'
HELDOUT_LOSS = 'heldout_loss'
_FILE = 'best.json'


class BestState(SavedSteps):
  """Keeps the parameters with the best measure of a run.

  Attributes:
    measure: name in the records of the log; of `HELDOUT_LOSS` the lowest value
      is best, of scores the highest.
    step: of the best state; 0 for none yet.
    value: its measure.
  """

  def __init__(
    self,
    workdir: Path,
    measure: str,
    item: str,
    coordinator: Coordinator,
    warn: Callable[[str], None],
  ):
    """Reads what an earlier start of the run left.

    Raises:
      CheckpointError: the folder cannot be opened, or is of an older version.
    """
    folder = buckets.absolute(workdir) / FOLDER
    if (folder / item).is_dir():
      raise CheckpointError(
        f'{folder} was written by an earlier version, which kept its best '
        'state otherwise: move it elsewhere (it opens there as before) and '
        'start the same command again'
      )
    self.measure = measure
    self._sign = -1 if measure == HELDOUT_LOSS else 1
    self._file = folder / _FILE
    self._item = item
    super().__init__(
      folder / CHECKPOINTS,
      {item: ocp.StandardCheckpointHandler()},
      coordinator,
      max_to_keep=1,
      best_fn=self._rank,
    )
    damage = {step: self.damage(step) for step in self.all()}
    damaged = {step: reason for step, reason in damage.items() if reason}
    self.set_aside(damaged, warn, 'the next state counts as best')
    self.step, self.value = self.agreed('the best state', self._read())
    self._named = 0
    self._name(self.step)

  def _rank(self, metrics: dict[str, Any]) -> float:
    """A number that is larger the better a saved state is."""
    if metrics['measure'] != self.measure:
      return -math.inf
    return self._sign * metrics['value']

  def _read(self) -> tuple[int, float]:
    """The best step that is there, and its value."""
    step = self.manager.best_step()
    if step is not None:
      metrics = self.manager.metrics(step)
      if metrics['measure'] == self.measure:
        return step, metrics['value']
    return 0, -self._sign * math.inf

  def offer(self, step: int, record: dict[str, float], params: Any) -> str:
    """Starts saving parameters if they are the best so far.

    Args:
      step: that they are of.
      record: what has been measured; perhaps not what decides.
      params: what a checkpoint of this run holds.

    Returns:
      What to say of it.

    Raises:
      CheckpointError: saving failed, or the state before was not saved.
    """
    value = record.get(self.measure, math.nan)
    if not self._sign * value > self._sign * self.value:
      return ''
    if step in self.manager.all_steps():
      return (
        f'better than what {self._file.parent} has of this step, which was '
        'trained otherwise and stays until a later step is better'
      )
    self.save_items(
      step,
      {self._item: ocp.args.StandardSave(params, save_args=save_args(params))},
      metrics={'measure': self.measure, 'value': value},
      # Also where an earlier start has saved a later step.
      force=True,
    )
    self.step, self.value = step, value
    return f'the best so far, kept in {FOLDER}/'

  def check_measured(self, scores: dict[str, float]) -> None:
    """Raises ConfigError if a score decides that is not among these."""
    if self.measure != HELDOUT_LOSS and self.measure not in scores:
      raise ConfigError(
        f'TrainConfig.best={self.measure!r} is not measured; scores are '
        f'{", ".join(scores)}'
      )

  def record(self) -> dict[str, float]:
    """The best state so far, for the log."""
    if not self.step:
      return {}
    return {'best/step': self.step, f'best/{self.measure}': self.value}

  def stands_since(self, steps: int, step: int) -> bool:
    """Whether the best state is so many steps old, at a step."""
    return bool(self.step) and step - self.step >= steps

  def finish(self) -> None:
    """Waits for the last save; raises CheckpointError if it failed."""
    super().finish()
    self._name(self.complete)

  def _name(self, step: int | None) -> None:
    """Writes which state is there."""
    if self._first and step and step != self._named:
      content = {'step': self.step, self.measure: self.value}
      buckets.write(self._file, json.dumps(content) + '\n')
      self._named = step
