"""Who holds a run's folder, and that a dead one does not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train import lock

HOLDS = """
import pathlib, sys, os
from qwenvl_jax.train.lock import locked
with locked(pathlib.Path(sys.argv[1]), print):
  # A child lives on: what it inherits must not hold the folder.
  if os.fork() == 0:
    os.execvp('sleep', ['sleep', '20'])
  print('held', flush=True)
  sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr(lock, 'WAIT_S', 0.2)
  monkeypatch.setattr(lock, 'BEAT_INTERVAL_S', 0.05)
  monkeypatch.setattr(lock, 'BEAT_TIMEOUT_S', 0.6)


def hold(folder, said=None):
  said = [] if said is None else said
  return lock.locked(folder, said.append)


def test_a_second_process_is_told_who_the_first_is(tmp_path):
  first = subprocess.Popen(
    [sys.executable, '-c', HOLDS, str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    start_new_session=True,
    text=True,
  )
  try:
    assert first.stdout.readline() == 'held\n'
    with pytest.raises(ConfigError) as error, hold(tmp_path):
      pass
    assert re.search(
      rf'is in use by process {first.pid} on {socket.gethostname()} since 20',
      str(error.value),
    )
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK_FILE]
    # Killed, it leaves nothing behind that would hold others up.
    first.kill()
    first.wait()
    with hold(tmp_path):
      assert f'process {os.getpid()} ' in (tmp_path / 'lock').read_text()
    assert (tmp_path / 'lock').read_text() == ''
  finally:
    os.killpg(first.pid, signal.SIGKILL)


def test_a_lock_is_free_again_after_an_error(tmp_path):
  with pytest.raises(ZeroDivisionError), hold(tmp_path):
    raise ZeroDivisionError
  with hold(tmp_path):
    pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
  def flock(file, how):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(lock.fcntl, 'flock', flock)
  said = []
  with hold(tmp_path, said):
    assert 'this file system knows no locks' in said[0]


@pytest.fixture
def folder(bucket):
  return buckets.as_path(f'{bucket.url}/run')


def test_in_a_bucket_a_living_holder_is_named(folder, monkeypatch):
  with hold(folder):
    # As it would look from another machine.
    monkeypatch.setattr(lock, '_gone', lambda holder: False)
    said = []
    taken = pytest.raises(ConfigError, match='is in use by process')
    with taken, hold(folder, said):
      pass
    assert 'for a sign of life' in said[0]
  assert not (folder / 'lock').exists()


def test_in_a_bucket_a_dead_holder_is_waited_for_once(folder):
  dead = {'holder': 'process 1 on other since', 'host': 'other', 'pid': 1}
  buckets.write(folder / 'lock', json.dumps(dead))
  said = []
  with hold(folder, said):
    assert len(said) == 1
    assert str(os.getpid()) in (folder / 'lock').read_text()


def test_in_a_bucket_a_dead_process_of_this_machine_is_known(folder):
  done = subprocess.Popen(['true'])
  done.wait()
  dead = {
    'holder': 'process',
    'host': socket.gethostname(),
    'boot': lock._boot(),
    'pid': done.pid,
  }
  buckets.write(folder / 'lock', json.dumps(dead))
  said = []
  with hold(folder, said):
    assert not said


def test_in_a_bucket_who_lost_the_lock_is_told(folder):
  with hold(folder) as check:
    check()
    other = {'holder': 'process 7 on other since', 'id': 'another'}
    buckets.write(folder / 'lock', json.dumps(other))
    for _ in range(100):
      lock.time.sleep(0.02)
      try:
        check()
      except ConfigError as error:
        assert 'process 7 on other' in str(error)
        break
    else:
      raise AssertionError('nobody noticed')
  # It is the other's now.
  assert 'another' in (folder / 'lock').read_text()
