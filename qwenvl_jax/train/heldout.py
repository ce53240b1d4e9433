"""The loss on data that is not trained on, while training."""

import dataclasses
import itertools
from collections.abc import Callable
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


def heldout_loss(
  config: HeldOut, objective: Objective, mesh: Mesh, shard: DataShard, like: Any
) -> Callable[[Any], float]:
  """Makes what computes the mean loss of a label on the held-out data.

  Args:
    config: see `HeldOut`.
    objective: model and loss.
    mesh: see `make_mesh`.
    shard: the part of the data that this process reads.
    like: nested dict of what has the shardings of the parameters.

  Returns:
    A function of parameters; NaN if no label has a weight.
  """
  sums = compile_loss(objective, mesh, like)

  def loss(params: Any) -> float:
    total = weight = 0.0
    iterator = config.data.iterator(shard.index, shard.count)
    for batch in itertools.islice(iterator, config.batches):
      objective.check(batch)
      found = jax.device_get(sums(params, put_batch(batch, mesh)))
      total, weight = total + float(found[0]), weight + float(found[1])
    return total / weight if weight else float('nan')

  return loss
