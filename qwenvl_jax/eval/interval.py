"""Bootstrap confidence intervals; a seed makes them the same every time."""

from collections.abc import Iterator, Sequence

import numpy as np

from qwenvl_jax.eval.task import Scores, Task, Unit

RESAMPLES = 1000
LEVEL = 0.95

# Units that are drawn in all where a task aggregates them itself.
_MOST_DRAWN = 5_000_000
_FEWEST = 100

Interval = tuple[float, float]


def of_task(
  task: Task, units: Sequence[Unit], seed: int = 0
) -> dict[str, Interval]:
  """The interval of each score of a task.

  Returns:
    Metric to the bounds that hold `LEVEL` of the resamples' scores. Linear in
    the number of units.
  """
  if not units:
    return {}
  if type(task).aggregate is Task.aggregate:
    return of_means([unit.scores for unit in units], seed)
  found = [
    task.aggregate([units[i] for i in draw])
    for draw in draws(len(units), count(len(units)), seed)
  ]
  return {
    name: bounds([scores.get(name, np.nan) for scores in found])
    for name in task.aggregate(units)
  }


def of_means(scores: Sequence[Scores], seed: int = 0) -> dict[str, Interval]:
  """The interval of the mean of each metric, over those that have it."""
  names = dict.fromkeys(name for one in scores for name in one)
  table = np.array(
    [[one.get(name, np.nan) for name in names] for one in scores]
  )
  present = ~np.isnan(table)
  values = np.where(present, table, 0)
  with np.errstate(invalid='ignore'):  # A draw without the metric: NaN.
    found = [
      values[draw].sum(0) / present[draw].sum(0)
      for draw in draws(len(scores), RESAMPLES, seed)
    ]
  return {
    name: bounds(column)
    for name, column in zip(names, np.transpose(found), strict=True)
  }


def count(units: int) -> int:
  """How often units are drawn where one drawing is slow."""
  return min(RESAMPLES, max(_FEWEST, _MOST_DRAWN // units))


def draws(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
  """Yields [units] indices drawn with replacement, so many times."""
  rng = np.random.default_rng(seed)
  for _ in range(resamples):
    yield rng.integers(0, units, units)


def bounds(values: Sequence[float]) -> Interval:
  """What holds `LEVEL` of the values that are numbers."""
  values = np.asarray(values, float)
  if np.isnan(values).all():
    return float('nan'), float('nan')
  low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return float(low), float(high)
