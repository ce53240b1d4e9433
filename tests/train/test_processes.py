"""Runs of several real processes."""

import collections
import json
import math
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.coordinator import LOST
from qwenvl_jax.train.processes import Place, find_place

RUNNER = pathlib.Path(__file__).with_name('multiprocess_runner.py')
BATCH = 8


def run(folder, *runs):
  """What became of some starts of one run, see `multiprocess_runner.Run`."""
  file = folder.with_suffix('.json')
  file.write_text(json.dumps([{'workdir': str(folder), **x} for x in runs]))
  done = subprocess.run(
    [sys.executable, RUNNER, file],
    env=os.environ | {'PYTHONPATH': str(RUNNER.parents[2])},
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr
  results = json.loads(done.stdout)
  print(json.dumps(results, indent=1))  # Shown if the test fails.
  return results


def losses(folder):
  return losses_of((folder / 'log.jsonl').read_text())


def losses_of(log):
  lines = log.splitlines()
  records = [json.loads(line) for line in lines]
  assert [r['step'] for r in records] == list(range(1, 25))
  return [r['loss'] for r in records]


def read_rows(folder):
  """Per start of the run, the rows of each batch that all readers read."""
  found = []
  for attempt in sorted({p.name.split('-')[0] for p in folder.glob('rows/*')}):
    parts = [
      [list(map(int, line.split())) for line in p.read_text().splitlines()]
      for p in sorted(folder.glob(f'rows/{attempt}-*'))
    ]
    found.append([sorted(sum(batch, [])) for batch in zip(*parts)])
  return found


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed') / 'run'
  (result,) = run(folder, {})
  assert result['statuses'] == [0] * 4
  return folder


@pytest.mark.slow
def test_every_row_is_read_once(undisturbed):
  (batches,) = read_rows(undisturbed)
  assert sum(batches[:24], []) == list(range(24 * BATCH))


@pytest.mark.slow
def test_one_of_four_killed_the_others_say_so_and_the_restart_is_identical(
  tmp_path, undisturbed
):
  seed = int.from_bytes(os.urandom(4))
  print('seed', seed)
  rng = random.Random(seed)
  victim, after = rng.randrange(4), rng.randrange(1, 20)
  kill = {'signum': 9, 'victim': victim, 'after': after}
  kill['delay'] = rng.uniform(0, 0.1)
  killed, again = run(tmp_path / 'run', kill, {})
  for index, (status, said) in enumerate(
    zip(killed['statuses'], killed['said'])
  ):
    assert status == (-9 if index == victim else LOST)
    if index != victim:
      assert f'error: process {victim} of 4' in said
      assert 'is gone: it was killed or crashed' in said
  assert killed['seconds'] < 30
  assert again['statuses'] == [0] * 4
  np.testing.assert_array_equal(
    np.load(tmp_path / 'run' / 'checksums-0.npy'),
    np.load(undisturbed / 'checksums-0.npy'),
  )
  assert losses(tmp_path / 'run') == losses(undisturbed)


@pytest.mark.slow
def test_stopped_and_damaged_it_goes_on_with_other_numbers_of_processes(
  tmp_path, undisturbed
):
  folder = tmp_path / 'run'
  stopped, two, one = run(
    folder,
    {'signum': 15, 'victim': 2, 'after': 6},
    {
      'processes': 2,
      'devices': 2,
      'mesh': {'data': 2, 'fsdp': 2},
      'flip': 'params',
      'stop_at': 18,
    },
    {'processes': 1},
  )
  # All save the same step, whoever was told to stop.
  assert stopped['statuses'] == [143] * 4
  stops = {said.split('stopped by SIGTERM')[1] for said in stopped['said']}
  assert len(stops) == 1
  at = int(stops.pop().split('at step ')[1].split(',')[0])
  # What the bit belonged to is not used; all agree on the step before.
  assert two['statuses'] == [0, 0]
  assert f'checkpoints/{at} is damaged (' in two['said'][0]
  before = max(range(4, at, 4))
  assert f'resumed from step {before}' in two['said'][0]
  assert one['statuses'] == [0]
  assert 'resumed from step 18' in one['said'][0]

  np.testing.assert_allclose(losses(folder), losses(undisturbed), rtol=1e-5)
  # Whoever read them: each batch of the run, by the last start that did.
  batches = {}
  for begin, rows in zip((0, before, 18), read_rows(folder), strict=True):
    batches |= dict(enumerate(rows, begin))
  taken = collections.Counter(sum((batches[x] for x in range(24)), []))
  assert taken == collections.Counter(range(24 * BATCH))


def ended(folder):
  """Checksums of the last state, one row for each process that had it."""
  return np.stack([np.load(p) for p in sorted(folder.glob('checksums-*.npy'))])


@pytest.mark.slow
def test_all_go_back_to_one_step_and_leave_out_the_same_data(tmp_path):
  spike, nan, killed = (tmp_path / x for x in ('spike', 'nan', 'killed'))
  two = {'processes': 2, 'bad': 50.0}
  delay = random.SystemRandom().uniform(0, 0.4)
  kill = {'signum': 9, 'victim': 1, 'after': 16, 'delay': delay}
  *whole, gone, again = run(
    spike,
    two,
    two | {'bad': math.nan, 'workdir': str(nan)},
    two | kill | {'workdir': str(killed)},
    two | {'workdir': str(killed)},
  )
  for folder, result in zip((spike, nan), whole, strict=True):
    assert result['statuses'] == [0, 0]
    assert 'back to step 12, leaving out that data' in result['said'][0]
    log = (folder / 'log.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in log]
    (back,) = [r for r in records if 'rolled_back_from' in r]
    assert back == {'step': 12, 'rolled_back_from': 18}
    after = records[records.index(back) + 1 :]
    assert [r['step'] for r in after] == list(range(13, 25))
    assert all(r['loss'] < 20 and not r['skipped'] for r in after)
    # Each batch once and in turn, in both: what went into steps 13 to 18, and
    # the one after, is not read again.
    (batches,) = read_rows(folder)
    assert sum(batches, []) == list(range((24 + 7) * BATCH))
    state = ended(folder)
    np.testing.assert_array_equal(state[0], state[1])

  # Killed about when it goes back and started again, it does the same.
  assert gone['statuses'] == [LOST, -9]
  assert again['statuses'] == [0, 0]
  np.testing.assert_array_equal(ended(killed), ended(spike))


@pytest.mark.slow
def test_all_end_when_the_best_state_stands_and_it_is_kept(tmp_path):
  two = {'processes': 2, 'steps': 100, 'overshoots': True}
  result, again = run(tmp_path / 'run', two, two)
  for each in (result, again):
    assert each['statuses'] == [0, 0]
  log = (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()
  losses = {
    r['step']: r['heldout_loss']
    for r in map(json.loads, log)
    if 'heldout_loss' in r
  }
  best = min(losses, key=losses.get)
  assert max(losses) == best + 6 < 100
  folder = tmp_path / 'run' / 'best'
  assert json.loads((folder / 'best.json').read_text())['step'] == best
  assert [x.name for x in (folder / 'checkpoints').iterdir()] == [str(best)]
  assert 'nothing left to do' in again['said'][0]


@pytest.mark.slow
def test_in_a_bucket_with_other_numbers_of_processes(
  tmp_path, undisturbed, bucket
):
  folder = tmp_path / 'run'
  place = {'bucket': f'{bucket.url}/run'}
  two, one = run(
    folder, place | {'processes': 2, 'stop_at': 10}, place | {'processes': 1}
  )
  assert two['statuses'] == [0, 0]
  assert one['statuses'] == [0]
  assert 'resumed from step 10' in one['said'][0]
  found = losses_of(bucket.objects['run/log.jsonl'].decode())
  np.testing.assert_allclose(found, losses(undisturbed), rtol=1e-5)
  first, second = read_rows(folder)
  taken = sum(first[:10] + second[:14], [])
  assert sorted(taken) == list(range(24 * BATCH))


@pytest.mark.parametrize(
  ('environ', 'said'),
  [
    ({'QWENVL_COORDINATOR': 'a:1'}, 'NUM_PROCESSES and QWENVL_PROCESS_ID not'),
    ({'QWENVL_COORDINATOR': 'a'}, 'is not HOST:PORT'),
    ({'QWENVL_NUM_PROCESSES': 'two'}, 'NUM_PROCESSES=two is not a number'),
    ({'QWENVL_PROCESS_ID': '4'}, 'numbered from 0 to 3'),
  ],
)
def test_an_impossible_place_is_refused(environ, said):
  if len(environ) == 1 and 'a:1' not in environ.values():
    whole = {
      'QWENVL_COORDINATOR': 'a:1',
      'QWENVL_NUM_PROCESSES': '4',
      'QWENVL_PROCESS_ID': '0',
    }
    environ = whole | environ
  with pytest.raises(ConfigError, match=said):
    find_place(environ)


def test_places():
  assert find_place({}) is None
  environ = {
    'QWENVL_COORDINATOR': '[::1]:80',
    'QWENVL_NUM_PROCESSES': '4',
    'QWENVL_PROCESS_ID': '3',
  }
  assert find_place(environ) == Place('[::1]:80', 4, 3)
  with pytest.raises(ConfigError, match='no TPU pod'):
    find_place({}, detect=True)
