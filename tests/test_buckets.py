"""Folders of a bucket and of a disk, by the same functions."""

import importlib.util
import os
import pathlib
import resource
import weakref

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from fake_storage import Refused

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
  """A folder that is not there yet."""
  if request.param == 'disk':
    return tmp_path / 'a' / 'b'
  bucket = request.getfixturevalue('bucket')
  return buckets.as_path(f'{bucket.url}/a/b')


def fill(place):
  for name in ('one', 'd/two', 'd/e/three'):
    buckets.make_folder((place / name).parent)
    buckets.write(place / name, name)


def test_paths(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert buckets.as_path('~/x') == tmp_path / 'x'
  assert isinstance(buckets.as_path('x'), pathlib.Path)
  path = buckets.as_path('gs://b/x') / 'y z'
  assert str(path) == 'gs://b/x/y z'
  assert buckets.as_path(path) is path
  assert buckets.absolute(path) is path
  assert buckets.split(path) == ('b', 'x/y z')
  for wrong in ('s3://b/x', 'gs://', 'gs:///x'):
    with pytest.raises(ConfigError, match='neither a folder nor a bucket'):
      buckets.as_path(wrong)


def test_what_opens_buckets_is_asked_for(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'qwenvl_jax\[gcs\]'"):
    buckets.as_path('gs://b/x')


def test_files(place, tmp_path):
  fill(place)
  assert buckets.sizes(place) == {'one': 3, 'd/two': 5, 'd/e/three': 9}
  names = ['d/two', 'one']
  assert dict(buckets.contents(place, names)) == {
    'd/two': b'd/two',
    'one': b'one',
  }
  assert dict(buckets.contents(place, [])) == {}
  assert buckets.size(place / 'd/two') == 5
  found = np.zeros(2, np.uint8)
  assert buckets.read_into(place / 'd/two', 2, found) == 2
  assert bytes(found) == b'tw'
  assert buckets.read_into(place / 'd/two', 4, found) == 1
  assert bytes(found) == b'ow'
  version = buckets.version(place / 'one')
  buckets.write(place / 'one', b'\x00\xff')
  assert (place / 'one').read_bytes() == b'\x00\xff'
  assert buckets.version(place / 'one') != version
  buckets.copy(place / 'd/two', tmp_path / 'two')
  assert (tmp_path / 'two').read_text() == 'd/two'
  with pytest.raises(OSError):
    buckets.version(place / 'none')


def test_a_folder_moves_over_another(place):
  fill(place)
  other = place.parent / 'other' / '7'
  buckets.make_folder(other)
  buckets.write(other / 'old', '')
  buckets.move(place, other, 'one')
  assert not buckets.sizes(place)
  found = buckets.sizes(other)
  found.pop('one', None)  # Not a copy of the mark, where it is one.
  assert found == {'d/two': 5, 'd/e/three': 9}
  buckets.remove(other)
  buckets.remove(other)
  assert not buckets.sizes(other)


def test_a_move_that_is_interrupted_leaves_nothing_that_looks_whole(bucket):
  place = buckets.as_path(f'{bucket.url}/a')
  fill(place)

  def refuse(method, name):
    if method == 'PUT':
      raise Refused(403, 'no')

  bucket.storage.before = refuse
  with pytest.raises(OSError, match='Forbidden'):
    buckets.move(place, buckets.as_path(f'{bucket.url}/b'), 'one')
  assert set(bucket.objects) == {'a/d/two', 'a/d/e/three'}


def test_large_files_are_uploaded_in_pieces(bucket, tmp_path):
  file = tmp_path / 'file'
  data = bytes(range(256)) * 2**16
  file.write_bytes(data)
  buckets.upload(file, buckets.as_path(f'{bucket.url}/x'))
  assert bucket.objects['x'] == data


def test_many_objects_are_few_requests(bucket):
  place = buckets.as_path(f'{bucket.url}/a')
  for number in range(1500):
    bucket.put(f'a/{number}', b'x')
  before = len(bucket.storage.requests)
  assert len(buckets.sizes(place)) == 1500
  assert len(bucket.storage.requests) - before <= 3


def test_what_others_write_is_seen(bucket):
  place = buckets.as_path(f'{bucket.url}/a')
  fill(place)
  assert len(list(place.iterdir())) == 2
  bucket.put('a/four', b'')
  bucket.delete('a/one')
  assert {p.name for p in place.iterdir()} == {'d', 'four'}
  assert not (place / 'one').exists()


def test_refusals_are_told_from_damage(bucket):
  place = buckets.as_path(f'{bucket.url}/a')

  def refuse(method, name):
    raise Refused(401 if name.endswith('1') else 403, f'no access to {name}')

  bucket.storage.before = refuse
  bucket.put('a/1', b'x')
  bucket.put('a/3', b'x')
  for name in '13':
    with pytest.raises(Exception) as caught:
      (place / name).read_bytes()
    assert f'no access to {bucket.name}/a/{name}' in buckets.unreachable(
      caught.value
    )
  wrapped = RuntimeError('reading failed')
  wrapped.__cause__ = ValueError('UNAVAILABLE: Error reading gs://b/x')
  assert buckets.unreachable(wrapped).startswith('UNAVAILABLE')
  for harmless in (
    FileNotFoundError('gs://b/x'),
    ValueError('DATA_LOSS: gs://b/x'),
    ValueError('NOT_FOUND: gs://b/x'),
  ):
    assert buckets.unreachable(harmless) is None


def test_who_may_not_use_a_bucket_is_told_so_in_a_line(bucket):
  def refuse(method, name):
    raise Refused(401, 'Anonymous caller does not have storage.objects.get')

  bucket.put('a/config.json', b'{}')
  bucket.storage.before = refuse
  file = buckets.as_path(f'{bucket.url}/a/config.json')
  told = pytest.raises(ConfigError, match='refuses: Anonymous.*login')
  with told, buckets.refusals_told():
    file.read_text()
  with pytest.raises(KeyError), buckets.refusals_told():
    raise KeyError('a fault of ours')


def test_what_was_to_be_written_goes_before_its_refusal(bucket):
  """Views of it in a cycle with the refusal crash Python 3.12.1."""

  def refuse(method, name):
    raise Refused(403, 'no access')

  bucket.storage.before = refuse
  place, views = buckets.as_path(f'{bucket.url}/a'), []

  def write():
    data = np.arange(9)
    views.append(weakref.ref(data))
    place.write_bytes(memoryview(data))

  with pytest.raises(ConfigError) as caught, buckets.refusals_told():
    write()
  assert 'no access' in str(caught.value)
  assert views[0]() is None


def test_a_file_appears_whole_or_the_old_one_stays(bucket, tmp_path):
  for path in (tmp_path / 'a.bin', buckets.as_path(f'{bucket.url}/x/a.bin')):
    buckets.write(path, 'old')
    with pytest.raises(KeyboardInterrupt), buckets.atomic_write(path) as local:
      local.write_text('half')
      assert path.read_text() == 'old'
      raise KeyboardInterrupt
    assert path.read_text() == 'old'
    with buckets.atomic_write(path) as local:
      local.write_text('new')
    assert path.read_text() == 'new'
  assert [x.name for x in tmp_path.iterdir()] == ['a.bin']
  assert list(bucket.objects) == ['x/a.bin']


def test_a_disk_that_is_full_is_told(tmp_path):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
  try:
    with (
      pytest.raises(OSError, match='too large.*a.array_record'),
      buckets.atomic_write(tmp_path / 'a.array_record') as local,
    ):
      writer = ArrayRecordWriter(str(local), 'group_size:1,uncompressed')
      writer.write(bytes(2**18))
      writer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_leaves_is_removed(tmp_path):
  writer = buckets.atomic_write(tmp_path / 'a.bin')
  writer.__enter__().write_text('half')
  (left,) = tmp_path.iterdir()
  assert left.name.endswith('.partial')
  buckets.remove_partial(tmp_path)
  assert not list(tmp_path.iterdir())
  writer.gen.close()


def test_only_regular_files_are_opened(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for path in (tmp_path / 'pipe', tmp_path, pathlib.Path('/dev/null')):
    with pytest.raises(OSError, match='not a regular file'):
      buckets.open_regular(path)
  (tmp_path / 'a').write_bytes(b'x')
  with buckets.open_regular(tmp_path / 'a') as file:
    assert file.read() == b'x'
