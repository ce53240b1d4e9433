"""Scores of a model while it is trained, and which checkpoint was best."""

import json
from pathlib import Path
from typing import Any, Protocol

from qwenvl_jax import buckets
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig

BEST = 'best.json'


class Evaluation(Protocol):
  """What scores a model (`eval.training.DuringTraining`).

  Attributes:
    every: steps between two evaluations; a checkpoint is saved with each.
  """

  every: int

  def __call__(
    self, config: QwenVLConfig, params: Any, workdir: Path
  ) -> dict[str, float]:
    """Returns scores by name; the first decides which checkpoint is best."""


def note_best(workdir: Path, step: int, scores: dict[str, float]) -> str:
  """Names the checkpoint of the highest first score in `best.json`.

  Steps after this one are of an earlier start and do not count.

  Args:
    workdir: the run's folder.
    step: that was scored.
    scores: not empty.

  Returns:
    What to say of it.

  Raises:
    CheckpointError: the file is there and not what this writes.
  """
  path = workdir / BEST
  name, score = next(iter(scores.items()))
  best = {'step': step, 'metric': name, 'score': score}
  if path.exists():
    try:
      before = json.loads(path.read_text())
      older = before['step'] < step and before['metric'] == name
      if older and before['score'] >= score:
        best = before
    except (ValueError, KeyError, TypeError) as error:
      raise CheckpointError(f'{path} cannot be read; remove it') from error
  buckets.write(path, json.dumps(best) + '\n')
  return f'best {name} so far: {best["score"]:.4f} at step {best["step"]}'
