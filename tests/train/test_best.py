"""The best state survives whatever ends a run while it is saved."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwenvl_jax.conversion.checkpoint_io import params_folder
from qwenvl_jax.conversion.orbax_store import restore
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.train.best import HELDOUT_LOSS, BestState
from qwenvl_jax.train.coordinator import Coordinator


def opened(folder, measure=HELDOUT_LOSS, warn=print):
  return BestState(folder, measure, 'params', Coordinator(), warn)


def offer(best, step, value, measure=HELDOUT_LOSS):
  params = {'a': jnp.full((3,), step, jnp.float32)}
  return best.offer(step, {measure: value}, params)


def kept(folder):
  """The step whose values a reader finds."""
  stored = params_folder(folder / 'best')
  values = restore(stored, None, {}, lambda path: True)
  return int(np.asarray(values['a'])[0])


def finished(best):
  best.finish()
  best.close()


def test_the_lowest_loss_stays_over_starts(tmp_path):
  best = opened(tmp_path)
  assert [bool(offer(best, *x)) for x in ((2, 3.0), (4, 1.0), (6, 2.0))] == [
    True,
    True,
    False,
  ]
  finished(best)
  again = opened(tmp_path)
  assert (again.step, again.value) == (4, 1.0)
  assert kept(tmp_path) == 4
  # Of a start that went on from before it, and did better.
  assert not offer(again, 3, float('nan'))
  assert offer(again, 3, 0.5)
  finished(again)
  assert kept(tmp_path) == 3
  assert json.loads((tmp_path / 'best/best.json').read_text()) == {
    'step': 3,
    HELDOUT_LOSS: 0.5,
  }


def test_the_highest_score_is_best_and_does_not_compare_with_a_loss(tmp_path):
  best = opened(tmp_path)
  offer(best, 2, 9.0)
  finished(best)
  scored = opened(tmp_path, 'eval/a')
  assert scored.step == 0 and not scored.record()
  assert offer(scored, 4, 0.1, 'eval/a') and offer(scored, 6, 0.2, 'eval/a')
  finished(scored)
  assert scored.record() == {'best/step': 6, 'best/eval/a': 0.2}
  assert kept(tmp_path) == 6


def test_a_crash_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
  best = opened(tmp_path)
  offer(best, 2, 3.0)
  best.finish()

  def crash(*args, **more):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'async_save', crash)
  with pytest.raises(CheckpointError, match='disk is full'):
    offer(best, 4, 1.0)
    best.finish()
  best.close()
  monkeypatch.undo()
  assert kept(tmp_path) == 2
  again = opened(tmp_path)
  assert (again.step, again.value) == (2, 3.0)
  finished(again)


def test_a_damaged_state_is_put_aside_and_said(tmp_path):
  best = opened(tmp_path)
  offer(best, 2, 3.0)
  finished(best)
  shutil.rmtree(tmp_path / 'best/checkpoints/2/params/d')
  said = []
  again = opened(tmp_path, warn=said.append)
  assert again.step == 0 and offer(again, 4, 5.0)
  finished(again)
  assert 'is damaged (' in said[0] and 'is missing' in said[0]
  assert kept(tmp_path) == 4


def test_the_folder_of_an_earlier_version_is_told_what_to_do(tmp_path):
  (tmp_path / 'best/params').mkdir(parents=True)
  with pytest.raises(CheckpointError, match='move it elsewhere'):
    opened(tmp_path)
