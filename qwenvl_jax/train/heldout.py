"""The loss on data that is not trained on, while training."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from qwenvl_jax.errors import check_at_least_1
from qwenvl_jax.sharding import put_batch
from qwenvl_jax.train.data_shard import Data, DataShard
from qwenvl_jax.train.objective import Objective
from qwenvl_jax.train.step import compile_loss


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A loss on data that is not trained on, while training.

  Attributes:
    data: read from its start every time, so that the numbers compare.
    every: steps between two of them; the run's last step has one, too.
    batches: how many.
    patience: after how many measures of the state (`TrainConfig.best` says of
      which) in a row without a better one the run ends, saved. None never ends
      it early.
  """

  data: Data
  every: int = 1000
  batches: int = 8
  patience: int | None = None

  def __post_init__(self):
    check_at_least_1(self, 'every', 'batches', 'patience')


class HeldOutLoss:
  """Computes the mean loss of a label on the held-out data."""

  def __init__(
    self,
    config: HeldOut,
    objective: Objective,
    mesh: Mesh,
    shard: DataShard,
    params: Any,
  ):
    """Compiles nothing yet; `params` is a nested dict of what has shardings."""
    self._config, self._objective = config, objective
    self._mesh, self._shard = mesh, shard
    self._sums = compile_loss(objective, mesh, params)

  def __call__(self, params: Any) -> float:
    """Returns the loss of parameters; NaN if no label has a weight."""
    iterator = self._config.data.iterator(self._shard.index, self._shard.count)
    total = weight = 0.0
    for _ in range(self._config.batches):
      batch = next(iterator, None)
      if batch is None:
        break
      self._objective.check(batch)
      sums = jax.device_get(self._sums(params, put_batch(batch, self._mesh)))
      total, weight = total + float(sums[0]), weight + float(sums[1])
    return total / weight if weight else float('nan')
