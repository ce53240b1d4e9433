"""Intervals of means, and of what tasks aggregate themselves."""

import dataclasses

import numpy as np
import pytest

from qwenvl_jax.eval import interval
from qwenvl_jax.eval.task import Example, Item, Prompt, Task, Unit, means

UNITS = [
  Unit((Item(Example(str(i), Prompt(('?',))), ''),), {'hit': float(i % 4 == 0)})
  for i in range(400)
]
TASK = Task('t', 'T')


@dataclasses.dataclass(frozen=True)
class Doubled(Task):
  def aggregate(self, units):
    return {
      name: 2 * value for name, value in means(u.scores for u in units).items()
    }


def test_a_mean_is_as_certain_as_statistics_say():
  ((low, high),) = interval.of_task(TASK, UNITS).values()
  deviation = np.sqrt(0.25 * 0.75 / 400)
  assert low == pytest.approx(0.25 - 1.96 * deviation, abs=0.006)
  assert high == pytest.approx(0.25 + 1.96 * deviation, abs=0.006)


def test_it_is_the_same_every_time():
  assert interval.of_task(TASK, UNITS) == interval.of_task(TASK, UNITS)
  assert interval.of_task(TASK, UNITS) != interval.of_task(TASK, UNITS, seed=1)


def test_what_a_task_aggregates_itself_is_drawn_alike():
  plain = interval.of_task(TASK, UNITS)['hit']
  doubled = interval.of_task(Doubled('d', 'D'), UNITS)['hit']
  assert doubled == pytest.approx([2 * bound for bound in plain])


def test_units_without_a_metric_do_not_count():
  scores = [{'a': 1.0}, {'b': 0.5}, {'a': 1.0, 'b': 0.5}]
  assert interval.of_means(scores) == {'a': (1.0, 1.0), 'b': (0.5, 0.5)}
  assert interval.of_task(TASK, []) == {}
