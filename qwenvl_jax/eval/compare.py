"""Two runs beside each other: paired differences, and what flipped."""

import dataclasses
import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwenvl_jax.data import html_page
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval import gallery, interval, results
from qwenvl_jax.eval.task import Item, Task, Unit, units

_RUNS = ('A', 'B')


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A task in two runs, over the units that both have.

  Attributes:
    task: what both ran.
    scores: of A and of B, by its own metric, as fractions.
    difference: B less A.
    bounds: the interval of the difference, items being drawn in pairs.
    count: units that both have.
    only: units that only A, and only B, has.
    flipped: keys of items whose scores differ to both items, those that became
      worse first.
  """

  task: Task
  scores: tuple[float, float]
  difference: float
  bounds: interval.Interval
  count: int
  only: tuple[int, int]
  flipped: dict[str, tuple[Item, Item]]

  @property
  def better(self) -> int:
    """Items that B scores higher."""
    return sum(_gain(self.task, pair) > 0 for pair in self.flipped.values())

  @property
  def worse(self) -> int:
    """Items that B scores lower."""
    return len(self.flipped) - self.better


def common_tasks(first: Path, second: Path) -> list[str]:
  """Names of the tasks that two runs have scored.

  Raises:
    ConfigError: there is none.
  """
  names = [
    {path.parent.name for path in folder.glob(f'*/{results.PREDICTIONS}')}
    for folder in (first, second)
  ]
  found = sorted(names[0] & names[1])
  if not found:
    raise ConfigError(
      f'{first} has {_listed(names[0])}, {second} {_listed(names[1])}: there '
      'is no task in both'
    )
  return found


def compare(task: Task, first: Path, second: Path, seed: int = 0) -> Comparison:
  """Compares two runs of a task.

  Raises:
    DataError: predictions cannot be read, or the runs share none.
  """
  runs = [
    {
      unit.items[0].example.group or unit.items[0].example.key: unit
      for unit in units(task, results.load_items(folder / task.name))
    }
    for folder in (first, second)
  ]
  common = [key for key in runs[0] if key in runs[1]]
  if not common:
    raise DataError(f'{task.name}: {first} and {second} share no example')
  pairs = [(runs[0][key], runs[1][key]) for key in common]
  scores = [_score(task, [pair[i] for pair in pairs]) for i in (0, 1)]
  return Comparison(
    task=task,
    scores=(scores[0], scores[1]),
    difference=scores[1] - scores[0],
    bounds=_bounds(task, pairs, seed),
    count=len(common),
    only=tuple(len(run) - len(common) for run in runs),
    flipped=_flipped(task, pairs),
  )


def _score(task: Task, found: Sequence[Unit]) -> float:
  return task.aggregate(found).get(task.metric, float('nan'))


def _bounds(
  task: Task, pairs: Sequence[tuple[Unit, Unit]], seed: int
) -> interval.Interval:
  if type(task).aggregate is Task.aggregate:
    differences = [
      {task.metric: b.scores[task.metric] - a.scores[task.metric]}
      for a, b in pairs
      if task.metric in a.scores and task.metric in b.scores
    ]
    return interval.of_means(differences, seed)[task.metric]
  found = [
    _score(task, [pairs[i][1] for i in draw])
    - _score(task, [pairs[i][0] for i in draw])
    for draw in interval.draws(len(pairs), interval.count(len(pairs)), seed)
  ]
  return interval.bounds(found)


def _flipped(
  task: Task, pairs: Sequence[tuple[Unit, Unit]]
) -> dict[str, tuple[Item, Item]]:
  found = {}
  for first, second in pairs:
    others = {item.example.key: item for item in second.items}
    for item in first.items:
      other = others.get(item.example.key)
      if other is not None and _gain(task, (item, other)):
        found[item.example.key] = item, other
  return dict(sorted(found.items(), key=lambda pair: _gain(task, pair[1])))


def _gain(task: Task, pair: tuple[Item, Item]) -> float:
  """By how much the second item is better."""
  first, second = (item.scores for item in pair)
  names = (
    [task.metric] if task.metric in first and task.metric in second else first
  )
  return float(np.sum([second.get(x, 0.0) - first[x] for x in names]))


def rows(found: Sequence[Comparison]) -> list[tuple[str, ...]]:
  """Rows of the table: task, metric, A, B, difference, interval, n, flips."""
  return [
    (
      one.task.title,
      one.task.metric,
      *(f'{score * one.task.scale:.2f}' for score in one.scores),
      f'{one.difference * one.task.scale:+.2f}',
      ' to '.join(f'{bound * one.task.scale:+.2f}' for bound in one.bounds),
      str(one.count),
      str(one.better),
      str(one.worse),
      ', '.join(
        f'{count} only {name}'
        for name, count in zip(_RUNS, one.only, strict=True)
        if count
      ),
    )
    for one in found
  ]


HEAD = (
  *('benchmark', 'metric', 'A', 'B', 'B - A', '95% interval', 'n'),
  *('better in B', 'worse in B', 'not compared'),
)


def page(found: Sequence[Comparison], data_dir: Path | None, count: int) -> str:
  """A page of what flipped: of each task half of either kind.

  Args:
    data_dir: files of the tasks, for pictures; None for none.
    count: flipped items of a task at most.
  """
  rows_ = ([html.escape(cell) for cell in row] for row in rows(found))
  figures = {}
  for one in found:
    keys = list(one.flipped)
    if len(keys) > count:
      keys = keys[: count - count // 2] + keys[len(keys) - count // 2 :]
    examples = {}
    # Of own questions the file is not known any more.
    if data_dir is not None and type(one.task) is not Task:
      one.task.check(data_dir)
      examples = {x.key: x for x in one.task.examples(data_dir)}
    shown = (
      gallery.Shown(
        one.task,
        examples.get(key, one.flipped[key][0].example),
        dict(zip(_RUNS, one.flipped[key], strict=True)),
      )
      for key in keys
    )
    figures[one.task.name] = one.task.title, gallery.figures(shown)
  return gallery.page('What flipped', figures, html_page.table(HEAD, rows_))


def _listed(names: set[str]) -> str:
  return json.dumps(sorted(names)) if names else 'no task that was scored'
