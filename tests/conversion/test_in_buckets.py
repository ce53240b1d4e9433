"""Checkpoint folders in a bucket: written, read, and told when unfinished."""

import golden
import jax
import numpy as np
import pytest
from fake_storage import Refused

import qwenvl_jax
from qwenvl_jax.buckets import as_path
from qwenvl_jax.conversion import cli
from qwenvl_jax.errors import CheckpointError


@pytest.fixture
def ours(bucket):
  """The golden checkpoint, converted into a bucket."""
  folder = f'{bucket.url}/models/ours'
  assert not cli.main(['from-hf', str(golden.FOLDER), folder])
  return folder


def test_there_and_back(bucket, ours, tmp_path, capsys):
  assert not cli.main(['verify', str(golden.FOLDER), ours])
  assert 'equal bit for bit' in capsys.readouterr().out
  back = f'{bucket.url}/models/back'
  arguments = ['to-hf', ours, back, '--max_shard_size', '200KB']
  assert not cli.main(arguments)
  names = [n for n in bucket.objects if n.startswith('models/back/')]
  assert sum(n.endswith('.safetensors') for n in names) > 1
  # Released weights are read from a bucket as well.
  assert not cli.main(['verify', back, str(golden.FOLDER)])
  assert not cli.main(['inspect', back])
  wanted = qwenvl_jax.load(golden.FOLDER, dtype='float32')
  for folder in (ours, back):
    found = qwenvl_jax.load(folder, dtype='float32')
    assert found.config == wanted.config
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
  assert not any('.partial' in name for name in bucket.objects)


def test_a_destination_in_use_is_left_alone(bucket, ours, capsys):
  before = bucket.objects
  assert cli.main(['from-hf', str(golden.FOLDER), ours]) == 2
  assert f'{ours} is not empty' in capsys.readouterr().err
  assert bucket.objects == before


def test_what_a_kill_left_is_no_checkpoint_and_is_cleared_away(
  bucket, ours, capsys
):
  bucket.put('models/ours/.partial', b'')
  bucket.put('models/ours/stale', b'')
  with pytest.raises(CheckpointError, match='unfinished conversion'):
    qwenvl_jax.load(ours)
  assert not cli.main(['from-hf', str(golden.FOLDER), ours])
  assert 'models/ours/stale' not in bucket.objects
  assert 'models/ours/.partial' not in bucket.objects


@pytest.mark.parametrize('command', ['from-hf', 'to-hf'])
def test_a_refusal_is_said_in_a_line(bucket, ours, command, capsys):
  def refuse(method, name):
    if method == 'PUT' and '/new/' in name and '.partial' not in name:
      raise Refused(403, 'x does not have storage.objects.create access')

  bucket.storage.before = refuse
  source = str(golden.FOLDER) if command == 'from-hf' else ours
  assert cli.main([command, source, f'{bucket.url}/new']) == 2
  said = capsys.readouterr().err
  assert 'could not be written' in said and 'objects.create' in said
  assert not [n for n in bucket.objects if n.startswith('new/')]


def test_what_is_not_there_is_named(bucket):
  for folder in ('none', 'models'):
    bucket.put('models/a/config.json', b'{}')
    with pytest.raises(CheckpointError, match=f'{bucket.url}/{folder}'):
      qwenvl_jax.load(as_path(f'{bucket.url}/{folder}'))


def test_torch_files_are_read_from_a_disk(bucket):
  bucket.put('a/config.json', (golden.FOLDER / 'config.json').read_bytes())
  bucket.put('a/pytorch_model.bin', b'x')
  with pytest.raises(CheckpointError, match='gcloud storage cp -r gs://'):
    qwenvl_jax.load(f'{bucket.url}/a')
