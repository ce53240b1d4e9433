"""A folder appears complete or not at all."""

import os
import random
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import golden
import pytest

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.atomic import new_folder
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import CheckpointError

KILLER = Path(__file__).with_name('killer.py')


def test_killed_at_random_moments(tmp_path):
  """Nothing opens as a checkpoint, and starting again works."""
  seed = int.from_bytes(os.urandom(4))
  print('seed', seed)  # Shown if this fails.
  chance = random.Random(seed)
  moments = [chance.uniform(0, 1) for _ in range(6)]
  done = subprocess.run(
    [sys.executable, KILLER, golden.FOLDER, tmp_path, *map(str, moments)],
    env=os.environ | {'PYTHONPATH': str(KILLER.parents[2])},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert not done.returncode, done.stderr
  assert done.stdout.count('killed') >= 2, done.stdout
  assert verify(golden.FOLDER, tmp_path / 'ours').same
  assert verify(golden.FOLDER, tmp_path / 'back').same
  assert sorted(p.name for p in tmp_path.iterdir()) == ['back', 'ours']


def test_destination_in_use_is_left_alone(tmp_path):
  target = tmp_path / 'mine'
  target.mkdir()
  (target / 'thesis.txt').write_text('years of work')
  with pytest.raises(CheckpointError, match='is not empty'):
    convert.from_hf(golden.FOLDER, target)
  assert (target / 'thesis.txt').read_text() == 'years of work'


def test_destination_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(CheckpointError, match='cannot be made'):
    convert.from_hf(golden.FOLDER, tmp_path / 'file' / 'ours')


def test_empty_destination_is_used(tmp_path):
  with new_folder(tmp_path, 0) as partial:
    (partial / 'x').write_text('1')
  assert (tmp_path / 'x').read_text() == '1'


def test_leftovers_do_not_open_and_are_cleared(tmp_path):
  partial = tmp_path / 'ours.partial'
  (partial / 'params').mkdir(parents=True)
  (partial / 'old.txt').write_text('')
  with pytest.raises(CheckpointError, match='partial is what an unfinished'):
    verify(partial, golden.FOLDER)
  with new_folder(tmp_path / 'ours', 0) as folder:
    assert folder == partial
    assert not any(folder.iterdir())
  assert (tmp_path / 'ours').is_dir()


def test_a_failure_leaves_nothing(tmp_path):
  with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / 'a', 0) as path:
    (path / 'half').write_text('')
    raise KeyboardInterrupt
  with (
    pytest.raises(CheckpointError, match='could not be written .*No space'),
    new_folder(tmp_path / 'a', 0),
  ):
    raise OSError(28, 'No space left on device')
  assert not any(tmp_path.iterdir())


def test_two_writers(tmp_path):
  with new_folder(tmp_path / 'a', 0) as first:
    (first / 'kept').write_text('')
    with (
      pytest.raises(CheckpointError, match='is being written by another'),
      new_folder(tmp_path / 'a', 0),
    ):
      pass
  assert (tmp_path / 'a' / 'kept').exists()


def test_space_is_checked_before(tmp_path, monkeypatch):
  usage = namedtuple('usage', 'total used free')
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(9, 9, 68_000_000))
  with pytest.raises(CheckpointError, match='needs 71.4 MB .* only 68.0 MB'):
    convert.from_hf(golden.FOLDER, tmp_path / 'ours')
  assert not any(tmp_path.iterdir())


def test_a_link_planted_in_its_place_is_not_followed(tmp_path):
  precious = tmp_path / 'precious'
  precious.mkdir()
  (precious / 'thesis.txt').write_text('years of work')
  (tmp_path / 'ours.partial').symlink_to(precious)
  with (
    pytest.raises(CheckpointError, match='ours.partial cannot be made'),
    new_folder(tmp_path / 'ours', 0),
  ):
    pass
  assert (precious / 'thesis.txt').read_text() == 'years of work'
