"""What tasks do unless they say otherwise."""

import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.task import (
  Example,
  File,
  Item,
  Prompt,
  Task,
  units,
)


def item(key, group=None, **scores):
  return Item(Example(key, Prompt(('?',)), group=group), '', scores=scores)


def test_groups_count_once():
  task = Task('t', 'T')
  items = [
    item('a', 'g', accuracy=1.0),
    item('b', accuracy=0.0),
    item('c', 'g', accuracy=0.0),
    item('g', accuracy=1.0),  # A key may be the name of a group.
  ]
  found = units(task, items)
  assert [unit.scores for unit in found] == [
    {'accuracy': 0.5},
    {'accuracy': 0.0},
    {'accuracy': 1.0},
  ]
  assert task.aggregate(found) == {'accuracy': 0.5}


def test_files_are_checked_before_a_model_is_opened(tmp_path):
  task = Task('t', 'T', files=(File('a/b.json', 'from https://example.org'),))
  with pytest.raises(DataError, match=r'b\.json: no such file.*example\.org'):
    task.check(tmp_path)
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'b.json').touch()
  with pytest.raises(DataError, match='is empty'):
    task.check(tmp_path)
  (tmp_path / 'a' / 'b.json').write_text('[]')
  task.check(tmp_path)


def test_names_that_are_near_are_suggested():
  assert registry.get('scenes_test').title == 'Scenes, held-out layouts'
  with pytest.raises(ConfigError, match='did you mean scenes_test'):
    registry.get('scene_test')


def test_every_task_says_what_a_figure_needs():
  for name, task in registry.all_tasks().items():
    assert name == task.name and name.isidentifier(), name
    assert task.template and task.postprocessing, name
    for figures in task.paper.values():
      assert figures, name
