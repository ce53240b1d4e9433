"""Prepared data sets in a bucket, read record by record."""

import pathlib
import pickle

import pytest
from fake_storage import Refused

from qwenvl_jax.data import prepare, records, sources, storage
from qwenvl_jax.errors import ConfigError, DataError


def test_scenes(bucket, prepared):
  bucket.put_folder(pathlib.Path(prepared), 'data')
  url = f'{bucket.url}/data'
  here = sources.Scenes(prepared, config='small', limit=5).open()
  there = sources.Scenes(url, config='small', limit=5).open()
  assert len(there) == 5
  for wanted, found in zip(here, there, strict=True):
    assert found == wanted
  assert len(sources.Scenes(url, config='small', max_objects=1).open())
  assert sources.prepared_configs(url) == ['small']
  assert sources.small_vocabulary(url) == f'{url}/qwen.tiktoken'


@pytest.fixture
def captions(bucket, tmp_path):
  """A data folder in a bucket with a set of two shards."""
  folder = storage.folder(tmp_path, 'captions')
  folder.mkdir(parents=True)
  made = [records.Record(id=f'{i}', captions=(f'text {i}',)) for i in range(7)]
  parts = made[:4], made[4:]
  for index, part in enumerate(parts):
    name = storage.shard_name('captions', 'train', index, 2)
    storage.write_shard(folder / name, part)
  storage.write_info(folder, 'captions', {'train': [4, 3]})
  bucket.put_folder(tmp_path, 'data')
  return sources.Prepared('captions', data_dir=f'{bucket.url}/data')


def test_shards(captions):
  sequence = captions.open()
  assert [sequence[i].captions for i in (6, 0)] == [('text 6',), ('text 0',)]
  # As Grain's workers get it.
  copy = pickle.loads(pickle.dumps(sequence))
  assert [copy[i].id for i in range(7)] == list('0123456')


def test_a_missing_shard_is_named(captions, bucket):
  (name,) = [n for n in bucket.objects if '00001-of' in n]
  bucket.delete(name)
  with pytest.raises(DataError, match='lacks 1 of 2 shards, e.g. captions-'):
    captions.open()


def test_a_bucket_that_refuses_is_no_bad_record(captions, bucket):
  sequence = captions.open()
  sequence[0]

  def refuse(method, name):
    raise Refused(403, 'x does not have storage.objects.get access')

  bucket.storage.before = refuse
  with pytest.raises(DataError, match='May this account read') as caught:
    for index in range(7):
      sequence[index]
  assert 'storage.objects.get' in str(caught.value)


def test_what_is_not_prepared_there_is_said(bucket):
  with pytest.raises(DataError, match=f'--data_dir {bucket.url}/data'):
    sources.Prepared('captions', data_dir=f'{bucket.url}/data').open()


def test_data_is_prepared_on_a_disk(bucket):
  with pytest.raises(ConfigError, match='gcloud storage rsync -r FOLDER gs://'):
    prepare.scenes(f'{bucket.url}/data', 'small')
