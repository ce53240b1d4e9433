"""Scores on a schedule: curves, and the best state by one of them."""

import dataclasses
import json

import fake
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.heldout import HeldOut
from qwenvl_jax.train.loop import train


@dataclasses.dataclass(frozen=True)
class Scores:
  """Says the next of some scores."""

  left: list
  every: int = 5
  measure: str = 'task/accuracy'

  def __call__(self, config, params, workdir):
    assert workdir.is_dir()
    return {'task/accuracy': self.left.pop(0), 'task/other': 1.0}


def test_the_best_state_is_named_and_there_whatever_is_kept(tmp_path):
  scores = Scores([0.5, 0.75, 0.75, 0.25])
  train(fake.line_run(steps=20, evaluation=scores), tmp_path)
  best = json.loads((tmp_path / 'best/best.json').read_text())
  assert best == {'step': 10, 'eval/task/accuracy': 0.75}
  assert [x.name for x in (tmp_path / 'best/checkpoints').iterdir()] == ['10']
  assert not (tmp_path / 'checkpoints/10').exists()
  lines = (tmp_path / 'log.jsonl').read_text().splitlines()
  records = [r for r in map(json.loads, lines) if 'eval/task/accuracy' in r]
  names = ('step', 'eval/task/accuracy', 'best/step', 'best/eval/task/accuracy')
  assert [tuple(r[x] for x in names) for r in records] == [
    (5, 0.5, 5, 0.5),
    (10, 0.75, 10, 0.75),
    (15, 0.75, 10, 0.75),
    (20, 0.25, 10, 0.75),
  ]


def test_the_last_state_may_be_the_best(tmp_path):
  train(fake.line_run(steps=7, evaluation=Scores([0.5, 0.75])), tmp_path)
  best = json.loads((tmp_path / 'best/best.json').read_text())
  assert best == {'step': 7, 'eval/task/accuracy': 0.75}


def test_patience_counts_what_decides(tmp_path, capsys):
  scores = Scores([0.5, 0.4, 0.3])
  heldout = HeldOut(fake.Points(16), every=1, batches=1, patience=2)
  config = fake.line_run(steps=20, evaluation=scores, heldout=heldout)
  # The loss is computed ten times before the second score.
  assert int(train(config, tmp_path).step) == 15
  assert 'better than 0.5000 since step 5' in capsys.readouterr().err
  # The next start finds nothing to do.
  assert int(train(config, tmp_path).step) == 15


def test_a_score_that_is_not_measured_is_named(tmp_path):
  config = fake.line_run(evaluation=Scores([0.5]), best='eval/task/anls')
  with pytest.raises(ConfigError, match='scores are eval/task/accuracy, eval'):
    train(config, tmp_path)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'best': 'accuracy'}, "best='accuracy' is neither 'heldout_loss' nor"),
    ({'best': 'eval/a/b'}, 'needs TrainConfig.evaluation'),
    ({'best': 'heldout_loss'}, 'needs TrainConfig.heldout'),
  ],
)
def test_a_measure_that_cannot_be_is_refused(changes, said):
  with pytest.raises(ConfigError, match=said):
    fake.line_run(**changes)
