"""Scores of a model while it is trained."""

from pathlib import Path
from typing import Any, Protocol

from qwenvl_jax.model.config import QwenVLConfig

# Before the names of scores in the records of a run.
PREFIX = 'eval/'


class Evaluation(Protocol):
  """What scores a model (`eval.training.DuringTraining`).

  Attributes:
    every: steps between two evaluations; the run's last step has one, too.
    measure: name of the score that decides, unless `TrainConfig.best` does,
      which state is best; the highest is.
  """

  every: int
  measure: str

  def __call__(
    self, config: QwenVLConfig, params: Any, workdir: Path
  ) -> dict[str, float]:
    """Returns scores by name."""
