"""The best state survives whatever ends a run while it is saved."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
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


def test_what_a_crash_leaves_has_the_state_before_or_the_new_one(tmp_path):
  steps = tmp_path / 'best/checkpoints'
  best = opened(tmp_path)
  offer(best, 2, 3.0)
  best.finish()
  shutil.copytree(steps / '2', tmp_path / '2')
  offer(best, 4, 1.0)
  finished(best)
  # Between the end of saving and the deletion of the state before.
  shutil.copytree(tmp_path / '2', steps / '2')
  again = opened(tmp_path)
  assert (again.step, kept(tmp_path)) == (4, 4)
  finished(again)
  # While the new one is written.
  shutil.copytree(tmp_path / '2', steps / '2', dirs_exist_ok=True)
  (steps / '4').rename(steps / '4.orbax-checkpoint-tmp')
  assert kept(tmp_path) == 2
  again = opened(tmp_path)
  assert (again.step, again.value) == (2, 3.0)
  finished(again)


SAVING = """
import pathlib, sys
import test_best
best = test_best.opened(pathlib.Path(sys.argv[1]))
for step in range(1, 9999):
  test_best.offer(best, step, -step)
  print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_a_random_moment_the_best_state_opens(tmp_path):
  place = pathlib.Path(__file__).parent
  paths = f'{place}:{place.parents[1]}'
  with subprocess.Popen(
    [sys.executable, '-c', SAVING, tmp_path],
    env=os.environ | {'PYTHONPATH': paths},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    wait = random.SystemRandom().uniform(0, 1)
    assert process.stdout.readline() == '1\n'
    process.stdout.readline()
    time.sleep(wait)
    process.kill()
    said = process.stdout.read().split() or ['2']
  again = opened(tmp_path)
  # Step k is complete before k + 1 begins; the last one said was begun.
  assert int(said[-1]) - 1 <= again.step <= int(said[-1]) + 1, wait
  assert kept(tmp_path) == again.step
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
