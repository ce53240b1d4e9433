"""Runs whose folder is in a bucket: as on a disk, by other means."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import fake
import numpy as np
import pytest
from bucket_runner import configuration, leaves
from fake_storage import Refused

from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.train import log_upload
from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.guard import Guard
from qwenvl_jax.train.heldout import HeldOut
from qwenvl_jax.train.loop import train

RUNNER = pathlib.Path(__file__).with_name('bucket_runner.py')


def same(a, b):
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


def log(bucket):
  return [json.loads(x) for x in bucket.objects['run/log.jsonl'].splitlines()]


def steps(bucket, folder='run/checkpoints'):
  """Complete steps, and all that have any object."""
  found = [n.removeprefix(f'{folder}/') for n in bucket.objects if folder in n]
  found = [n for n in found if '/' in n]
  done = [n for n in found if n.count('/') == 1 and 'commit_success' in n]
  return (
    sorted({int(n.split('/')[0]) for n in done}),
    sorted({int(n.split('/')[0]) for n in found}),
  )


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """The last state of the same run on a disk."""
  return leaves(train(configuration(), tmp_path_factory.mktemp('disk') / 'run'))


@pytest.mark.slow
def test_killed_while_it_writes_it_ends_as_on_a_disk(
  bucket, tmp_path, undisturbed
):
  seed = int.from_bytes(os.urandom(4))
  print('seed', seed)  # Shown if this fails.
  # A checkpoint is about thirty objects: these are in the midst of one, of the
  # log, of cleaning up, in any order.
  moments = random.Random(seed).sample(range(20, 110), 3)
  print('killed at changes', sorted(moments))
  changes, pid = 0, tmp_path / 'pid'

  def kill(method, name):
    nonlocal changes
    changes += method != 'GET'
    if method != 'GET' and changes in moments:
      os.kill(int(pid.read_text()), signal.SIGKILL)
      raise Refused(503, 'too late')

  bucket.storage.before = kill
  done = subprocess.run(
    [sys.executable, RUNNER, f'{bucket.url}/run', tmp_path / 'end.npz', pid],
    env=os.environ | {'PYTHONPATH': str(RUNNER.parents[2])},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert not done.returncode, done.stderr
  assert json.loads(done.stdout) == [-9] * 3 + [0], done.stderr
  with np.load(tmp_path / 'end.npz') as state:
    same(dict(state), undisturbed)
  assert [record['step'] for record in log(bucket)] == list(range(1, 9))
  assert steps(bucket) == ([6, 8], [6, 8])


@pytest.fixture
def stopped(bucket):
  """A bucket with a run that was stopped at step 6."""
  train(configuration(), f'{bucket.url}/run', stop_at=6)
  return bucket


def test_a_run_in_a_bucket(stopped, undisturbed, capsys):
  files = {n for n in stopped.objects if not n.startswith('run/checkpoints')}
  events = [n for n in files if n.startswith('run/tensorboard/events')]
  assert files == {'run/log.jsonl', *events} | {
    'run/config.json',
    'run/generation_config.json',
  }
  assert len(events) == 1
  state = train(configuration(), f'{stopped.url}/run')
  assert f'resumed from step 6 of {stopped.url}/run' in capsys.readouterr().err
  same(leaves(state), undisturbed)
  assert [record['step'] for record in log(stopped)] == list(range(1, 9))
  assert steps(stopped) == ([6, 8], [6, 8])


@pytest.mark.parametrize('sealed', [True, False])
@pytest.mark.parametrize('item', ['params', 'optimizer'])
def test_a_flipped_bit_is_named_and_the_step_before_used(
  stopped, undisturbed, capsys, item, sealed
):
  place = f'run/checkpoints/6/{item}/d/'
  name = max(
    (n for n in stopped.objects if n.startswith(place)),
    key=lambda n: len(stopped.objects[n]),
  )
  stopped.flip_a_bit(name)
  if not sealed:
    # As after a kill between the step and its manifest.
    stopped.delete('run/checkpoints/6/files.json')
  state = train(configuration(), f'{stopped.url}/run')
  said = capsys.readouterr()
  assert f'{stopped.url}/run/checkpoints/6 is damaged (' in said.out
  if sealed:
    assert name.removeprefix('run/checkpoints/6/') in said.out
  assert 'going on from step 4' in said.out
  same(leaves(state), undisturbed)
  damaged = [n for n in stopped.objects if 'checkpoints-damaged/6/' in n]
  assert len(damaged) > 10
  assert [record['step'] for record in log(stopped)] == list(range(1, 9))


def test_a_missing_object_is_named(stopped, capsys):
  stopped.delete('run/checkpoints/6/data/process_0-of-1.json')
  train(configuration(), f'{stopped.url}/run')
  said = capsys.readouterr().out
  assert 'data/process_0-of-1.json is missing' in said


def test_a_bucket_that_refuses_is_no_damaged_checkpoint(stopped):
  before = stopped.objects

  def refuse(method, name):
    if method == 'GET' and '/6/' in name and name.endswith('json'):
      raise Refused(403, 'x does not have storage.objects.get access')

  stopped.storage.before = refuse
  with pytest.raises(CheckpointError, match='storage.objects.get') as error:
    train(configuration(), f'{stopped.url}/run')
  assert 'roles storage.objectAdmin' in str(error.value)
  stopped.storage.before = None
  assert stopped.objects.keys() == before.keys()


def test_a_bucket_that_cannot_be_written_is_said_before_the_first_step(bucket):
  def refuse(method, name):
    if method == 'PUT':
      raise Refused(403, 'x does not have storage.objects.create access')

  bucket.storage.before = refuse
  with pytest.raises(
    ConfigError, match='cannot write to --workdir gs://.*crea'
  ):
    train(configuration(), f'{bucket.url}/run')


def test_a_bucket_that_is_not_there_is_named(cloud):
  with pytest.raises(ConfigError, match='there is no bucket nowhere.*create'):
    train(configuration(), 'gs://nowhere/run')


def test_the_best_state_is_kept_in_a_bucket(bucket):
  data = fake.Points(batch_size=16)
  heldout = HeldOut(data, every=2, batches=1, patience=9)
  for stop in 4, 8:
    train(configuration(heldout=heldout), f'{bucket.url}/run', stop_at=stop)
    best = json.loads(bucket.objects['run/best/best.json'])
    done, there = steps(bucket, 'run/best/checkpoints')
    assert done == there == [best['step']]
    found = [x for x in log(bucket) if 'best/step' in x]
    assert found[-1]['step'] == stop
    assert found[-1]['best/step'] == best['step']


def test_a_roll_back_deletes_what_came_after(bucket, capsys):
  data = fake.Points(bad_from=20, bad_until=26, bad=30.0)
  config = fake.line_run(
    steps=26,
    data=data,
    log_every=1,
    # Step 22 is saved before the spike of step 20 is noticed.
    checkpoint=CheckpointConfig(every=11, keep=3),
    guard=Guard(window=5, steps=3, rise=5.0),
  )
  state = train(config, f'{bucket.url}/run')
  assert int(state.step) == 26
  records = log(bucket)
  backs = [x for x in records if 'rolled_back_from' in x]
  assert backs, capsys.readouterr().err
  assert backs[0]['step'] == 11
  assert steps(bucket) == ([11, 22, 26], [11, 22, 26])


def test_the_log_is_copied_while_the_run_goes_on(bucket, monkeypatch):
  monkeypatch.setattr(log_upload, '_INTERVAL_S', 0.0)
  seen = []

  def look(method, name):
    if method == 'PUT' and name.endswith('log.jsonl'):
      seen.append(name)

  bucket.storage.before = look
  config = fake.line_run(steps=12, log_every=1, data=fake.Points(pause=0.05))
  train(config, f'{bucket.url}/run')
  # Not only at the checkpoint and the end.
  assert len(seen) > 3
  assert len(log(bucket)) == 12


def test_a_log_that_cannot_be_copied_does_not_end_a_run(
  bucket, undisturbed, capsys
):
  def refuse(method, name):
    if method == 'PUT' and ('log.jsonl' in name or 'events' in name):
      raise Refused(403, 'no logs here')

  bucket.storage.before = refuse
  state = train(configuration(), f'{bucket.url}/run')
  same(leaves(state), undisturbed)
  said = capsys.readouterr().err
  assert said.count('files cannot be copied there') == 1
  assert 'no logs here' in said


def test_a_profile_is_copied(bucket):
  train(configuration(profile_steps=(2, 3)), f'{bucket.url}/run', stop_at=4)
  assert [n for n in bucket.objects if n.endswith('.xplane.pb')]
