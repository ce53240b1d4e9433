import json
import math

import fake
import jax
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.guard import Guard, LossSpikeDetector
from qwenvl_jax.train.loop import DivergedError, train

SMALL = Guard(window=4, sigmas=4.0, rise=0.5, steps=3, limit=2)


def seen(losses, guard=SMALL):
  detector = LossSpikeDetector(guard)
  return [detector.see(step, x) for step, x in enumerate(losses, 1)]


def test_a_loss_that_stays_high_is_a_spike():
  found = seen([1.0, 1.1, 0.9, 1.0, 2.0, 2.1, 2.2])
  assert found[:-1] == [None] * 6
  assert (found[-1].step, found[-1].good) == (7, 4)
  assert 'at 2.2000 in step 7' in found[-1].said


@pytest.mark.parametrize(
  'losses',
  [
    # Twice high, then not.
    [1.0, 1.1, 0.9, 1.0, 2.0, 2.0, 1.0, 2.0, 2.0],
    # Within `rise`, whatever the deviation.
    [1.0, 1.0, 1.0, 1.0, 1.4, 1.4, 1.4],
    # Within `sigmas`, whatever the rise.
    [1.0, 3.0, 1.0, 3.0, 5.0, 5.0, 5.0],
    # Too early to tell.
    [1.0, 1.0, 1.0, 9.0, 9.0, 9.0],
    # Skipped steps are no loss.
    [1.0, 1.1, 0.9, 1.0, math.nan, math.nan, math.nan],
  ],
)
def test_what_is_no_spike(losses):
  assert seen(losses) == [None] * len(losses)


def test_a_resumed_watch_decides_the_same():
  losses = [1.0, 1.1, 0.9, 1.0, 2.0, 2.1, 2.2]
  first, second = LossSpikeDetector(SMALL), LossSpikeDetector(SMALL)
  for step in range(5):
    first.see(step + 1, losses[step])
  second.set_state(json.loads(json.dumps(first.get_state())))
  assert [second.see(x, losses[x - 1]) for x in (6, 7)] == seen(losses)[5:]


def test_impossible_guards_are_refused():
  with pytest.raises(ConfigError, match='window must be at least 2'):
    Guard(window=1)


def configuration(bad, **changes):
  """Bad data in batches 14 to 18, after a checkpoint of step 12."""
  return fake.line_run(
    steps=24,
    data=fake.Points(bad_from=14, bad_until=19, bad=bad),
    optimizer={'peak': 0.02, 'end': 0.02},
    checkpoint=CheckpointConfig(every=4, keep=3),
    log_every=1,
    guard=Guard(window=6, sigmas=6.0, rise=2.0, steps=4, limit=2),
    max_skipped=4,
    **changes,
  )


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def records(folder):
  lines = (folder / 'log.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize('bad', [50.0, np.nan])
def test_it_goes_back_leaves_out_the_data_and_ends_well(bad, tmp_path, capsys):
  whole = train(configuration(bad), tmp_path / 'whole')
  said = capsys.readouterr().err
  assert 'back to step 12, leaving out that data' in said
  (back,) = [r for r in records(tmp_path / 'whole') if 'rolled_back_from' in r]
  assert back == {'step': 12, 'rolled_back_from': 18}
  last = records(tmp_path / 'whole')[-1]
  assert last['step'] == 24 and last['skipped'] == 0 and last['loss'] < 5
  # Interrupted where the loss is high, it decides the same.
  train(configuration(bad), tmp_path / 'parts', stop_at=17)
  same(train(configuration(bad), tmp_path / 'parts'), whole)


def test_it_does_not_go_back_for_ever(tmp_path):
  config = fake.line_run(
    steps=40,
    data=fake.Points(bad_from=14, bad_until=999, bad=50.0),
    checkpoint=CheckpointConfig(every=4, keep=3),
    guard=Guard(window=6, sigmas=6.0, rise=2.0, steps=4, limit=2),
  )
  with pytest.raises(DivergedError, match=r'2 roll-backs \(Guard.limit=2\)'):
    train(config, tmp_path)


def test_with_nothing_to_go_back_to_it_says_so(tmp_path):
  config = fake.line_run(
    steps=30,
    data=fake.Points(bad_from=14, bad_until=30, bad=50.0),
    checkpoint=CheckpointConfig(every=50),
    guard=Guard(window=6, sigmas=6.0, rise=2.0, steps=4),
  )
  with pytest.raises(DivergedError, match='no checkpoint is from before'):
    train(config, tmp_path)
