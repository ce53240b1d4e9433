"""Scores on a schedule: curves, and the best checkpoint by name."""

import dataclasses
import json

import pytest
import standin

from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.evaluation import note_best
from qwenvl_jax.train.loop import train


@dataclasses.dataclass(frozen=True)
class Scores:
  """Says the next of some scores."""

  left: list
  every: int = 5

  def __call__(self, config, params, workdir):
    assert workdir.is_dir()
    return {'task/accuracy': self.left.pop(0), 'task/other': 1.0}


def test_the_best_checkpoint_is_named_and_there(tmp_path):
  config = standin.line_run(
    steps=20,
    evaluation=Scores([0.5, 0.75, 0.75, 0.25]),
    checkpoint=CheckpointConfig(every=1000, keep=4),
  )
  train(config, tmp_path)
  best = json.loads((tmp_path / 'best.json').read_text())
  assert best == {'step': 10, 'metric': 'task/accuracy', 'score': 0.75}
  assert (tmp_path / 'checkpoints' / '10').is_dir()
  lines = (tmp_path / 'log.jsonl').read_text().splitlines()
  records = [r for r in map(json.loads, lines) if 'eval/task/accuracy' in r]
  assert [(r['step'], r['eval/task/accuracy']) for r in records] == [
    (5, 0.5),
    (10, 0.75),
    (15, 0.75),
    (20, 0.25),
  ]


def test_scores_of_an_earlier_start_do_not_count(tmp_path):
  note_best(tmp_path, 30, {'a': 0.9})
  assert 'step 20' in note_best(tmp_path, 20, {'a': 0.1})
  assert 'step 20' in note_best(tmp_path, 30, {'a': 0.1})
  assert 'step 40' in note_best(tmp_path, 40, {'a': 0.2})
  (tmp_path / 'best.json').write_text('{')
  with pytest.raises(CheckpointError, match='remove it'):
    note_best(tmp_path, 50, {'a': 0.2})
