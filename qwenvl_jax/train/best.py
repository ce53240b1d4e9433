"""The best state of a run so far, by its loss on held-out data."""

import json
import math
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from qwenvl_jax import buckets
from qwenvl_jax.conversion.json_schema import (
  Field,
  Schema,
  check,
  read_json,
  real,
  whole,
)

FOLDER = 'best'
_FILE = 'best.json'
_SCHEMA: Schema = {
  'step': Field(whole(0, 2**31)),
  'heldout_loss': Field(real(-math.inf, math.inf)),
}


class Best:
  """Keeps what had the lowest loss, in a folder that opens as a checkpoint."""

  def __init__(self, workdir: Path, item: str, first: bool):
    """Reads what an earlier start of the run left.

    Args:
      workdir: the run's folder.
      item: what a step calls its parameters.
      first: whether this process writes small files.
    """
    self._folder, self._item, self._first = workdir / FOLDER, item, first
    self.step, self.loss = 0, math.inf
    if (self._folder / _FILE).exists():
      path = self._folder / _FILE
      found = check(read_json(path), _SCHEMA, str(path))
      self.step, self.loss = found['step'], found['heldout_loss']

  def see(self, step: int, loss: float, params: Any) -> bool:
    """Saves parameters if they are the best so far; returns whether they are.

    Args:
      step: that they are of.
      loss: on the held-out data.
      params: what a checkpoint of this run holds.
    """
    if not loss < self.loss:
      return False
    self.step, self.loss = step, loss
    buckets.make_folder(self._folder)
    if self._first:
      (self._folder / _FILE).unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
      place = buckets.absolute(self._folder) / self._item
      checkpointer.save(place, params, force=True)
    if self._first:
      content = {'step': step, 'heldout_loss': loss}
      buckets.write(self._folder / _FILE, json.dumps(content) + '\n')
    return True
