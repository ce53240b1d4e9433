"""Archives as people have them, and as nobody should have them."""

import gzip
import json
import os
import tarfile

import downloads
import pyarrow
import pyarrow.parquet
import pytest

from qwenvl_jax.data import roots
from qwenvl_jax.data.readers import archives
from qwenvl_jax.data.readers.img2dataset import Img2Dataset
from qwenvl_jax.errors import BadRecordError

_NAMES = archives.Names()
_JPEG = downloads.picture()


def read(path):
  return list(archives.read(path, _NAMES))


def reasons(found):
  return [x.reason for x in found if isinstance(x, BadRecordError)]


def pairs(path):
  """Key, picture and text of each sample."""
  return [
    (x.key, x.picture(_NAMES, x.key), x.text(_NAMES, x.key))
    for x in archives.read(path, _NAMES)
  ]


def parquet(path, **columns):
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.table(columns), path, compression='zstd')


def test_keys_end_at_the_first_dot_of_the_base_name(tmp_path):
  downloads.tar(
    tmp_path / '0.tar',
    {
      'v1.5/a.image.jpg': b'1', 'v1.5/a.caption.txt': b'one',
      'v1.5/a.meta.json': b'{"similarity": 0.5}',
      'v2/a.jpg': b'2', 'v2/a.TXT': b'two',
      'b.c.d.png': b'3', 'b.txt': b'three', 'README': b'x', 'b.mp4': b'y',
    },
  )  # fmt: skip
  assert pairs(tmp_path / '0.tar') == [
    ('v1.5/a', b'1', 'one'), ('v2/a', b'2', 'two'), ('b', b'3', 'three'),
  ]  # fmt: skip
  (first, *_) = read(tmp_path / '0.tar')
  assert first.fields['similarity'] == 0.5


def test_what_macos_lays_between_members_splits_no_sample(tmp_path):
  downloads.tar(
    tmp_path / '0.tar',
    {
      'a.jpg': b'1', '._a.jpg': b'x', '__MACOSX/._a.txt': b'x',
      '__MACOSX/a.txt': b'x', 'a.txt': b'one', '.DS_Store': b'x',
    },
  )  # fmt: skip
  (tmp_path / '._0.tar').write_bytes(b'no archive')
  assert pairs(tmp_path / '0.tar') == [('a', b'1', 'one')]
  assert Img2Dataset().parts(tmp_path) == [tmp_path / '0.tar']


@pytest.mark.parametrize('suffix', ['.tar.gz', '.tgz'])
def test_compressed_archives_and_members(tmp_path, suffix):
  files = {
    'a.jpg': _JPEG, 'a.txt.gz': gzip.compress(b'one'),
    'a.json.gz': gzip.compress(b'{"caption": "other"}'),
    'b.txt.gz': b'no gzip', 'b.jpg': _JPEG,
  }  # fmt: skip
  downloads.tar(tmp_path / 'plain', files)
  path = tmp_path / f'0{suffix}'
  path.write_bytes(gzip.compress((tmp_path / 'plain').read_bytes()))
  (found, error) = archives.read(path, _NAMES)
  assert found.text(_NAMES, '') == 'one' and found.picture(_NAMES, '') == _JPEG
  assert error.reason == 'malformed' and 'b.txt.gz' in str(error)
  path.write_bytes(path.read_bytes()[:-100])
  assert reasons(read(path)) == ['unreadable_record']


def test_a_field_that_stands_twice_is_malformed(tmp_path):
  with tarfile.open(tmp_path / '0.tar', 'w') as tar:
    for name in ('a.jpg', 'a.jpg', 'b.jpg'):
      member = tarfile.TarInfo(name)
      tar.addfile(member)
  error, other = read(tmp_path / '0.tar')
  assert error.reason == 'malformed' and 'a.jpg stands there twice' in str(
    error
  )
  assert other.key == 'b'


@pytest.mark.parametrize('inner', [b'{', b'[1]', b'5', b'"x"', b'\xff'])
def test_json_that_is_no_object(tmp_path, inner):
  downloads.tar(tmp_path / '0.tar', {'a.jpg': _JPEG, 'a.json': inner})
  assert set(reasons(read(tmp_path / '0.tar'))) <= {'malformed', 'invalid_utf8'}
  assert len(read(tmp_path / '0.tar')) == 1


def test_members_beyond_the_limits_are_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, 'MAX_PICTURE', 5000)
  downloads.tar(
    tmp_path / '0.tar',
    {
      'a.jpg': b'x' * 5001, 'a.txt': b'large', 'b.jpg': b'x' * 5000,
      'b.txt': b'small', 'c.json': b' ' * ((1 << 20) + 1),
      'd.txt.gz': gzip.compress(b'0' * (1 << 21)),
      **{f'e.{i}.jpg': b'x' for i in range(70)}, 'f.mp4': b'x' * 9000,
    },
  )  # fmt: skip
  monkeypatch.setattr(archives, '_MAX_TEXT', 1 << 10)
  found = read(tmp_path / '0.tar')
  assert reasons(found) == ['too_large'] * 4
  assert [x.key for x in found if isinstance(x, archives.Sample)] == ['b']


def test_a_sparse_member_is_not_expanded(tmp_path):
  """6 GB of nothing in a few hundred bytes."""
  member = tarfile.TarInfo('a.jpg')
  head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
  head[156:157] = tarfile.GNUTYPE_SPARSE
  head[386:410] = b'%011o\0%011o\0' % (0, 0)
  head[483:495] = b'%011o\0' % (6 << 30)
  total = sum(head[:148]) + sum(head[156:512]) + 8 * 32
  head[148:156] = b'%06o\0 ' % total
  downloads.tar(tmp_path / 'rest', {'b.jpg': _JPEG, 'b.txt': b'two'})
  (tmp_path / '0.tar').write_bytes(
    bytes(head) + (tmp_path / 'rest').read_bytes()
  )
  error, other = read(tmp_path / '0.tar')
  assert error.reason == 'too_large' and '6,442,450,944' in str(error)
  assert other.key == 'b'


@pytest.mark.parametrize('kind', [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_are_limited(tmp_path, kind):
  member = tarfile.TarInfo('x')
  member.type, member.size = kind, 1 << 30
  path = tmp_path / '0.tar'
  path.write_bytes(member.tobuf() + bytes(4096))
  (error,) = read(path)
  assert error.reason == 'unreadable_record' and '1,073,741,824' in str(error)
  # Each name but the last is one of the next.
  member.size = 1
  path.write_bytes((member.tobuf() + bytes(512)) * 3000)
  assert reasons(read(path)) == ['unreadable_record']


def test_pipes_are_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / '0.tar')
  os.mkfifo(tmp_path / 'a.jpg')
  (part,) = Img2Dataset().parts(tmp_path)
  (error,) = Img2Dataset().read(part)
  assert 'not a regular file' in str(error)
  with pytest.raises(BadRecordError, match='not a regular file'):
    roots.read(tmp_path, 'a.jpg', 'x')


def test_picture_files_are_limited(tmp_path, monkeypatch):
  monkeypatch.setattr(roots, 'MAX_PICTURE', 10)
  (tmp_path / 'a.jpg').write_bytes(b'x' * 11)
  with pytest.raises(BadRecordError, match='more than 10 bytes') as caught:
    roots.read(tmp_path, 'a.jpg', 'x')
  assert caught.value.reason == 'too_large'


def test_parquet_with_structs_of_pictures(tmp_path):
  """Only bytes are pictures: a path is not opened, whatever it is."""
  (tmp_path / 'secret.jpg').write_bytes(_JPEG)
  secret = str(tmp_path / 'secret.jpg')
  parquet(
    tmp_path / '0.parquet',
    image=[
      {'bytes': _JPEG, 'path': secret}, {'bytes': None, 'path': secret}, None,
    ],
    text=['a bus', 'x', 'y'],
  )  # fmt: skip
  parquet(tmp_path / '1.parquet', jpg=[secret], TEXT=['z'])
  reader = Img2Dataset()
  found = [x for part in reader.parts(tmp_path) for x in reader.read(part)]
  assert found[0].images == (_JPEG,) and found[0].captions == ('a bus',)
  assert reasons(found) == ['missing_image'] * 3
  parquet(tmp_path / '2.parquet', jpg=[_JPEG], TEXT=['as LAION says it'])
  (record,) = reader.read(tmp_path / '2.parquet')
  assert record.captions == ('as LAION says it',)


def test_what_pandas_leaves_empty_is_no_text(tmp_path):
  parquet(
    tmp_path / '0.parquet',
    jpg=[_JPEG, _JPEG],
    caption=[float('nan'), 7.0],
  )
  reader = Img2Dataset()
  found = list(reader.read(tmp_path / '0.parquet'))
  assert reasons(found) == ['empty_text'] and found[1].captions == ('7.0',)
  about = json.dumps({'caption': float('nan')}).encode()
  downloads.tar(tmp_path / '0.tar', {'a.jpg': _JPEG, 'a.json': about})
  assert reasons(reader.read(tmp_path / '0.tar')) == ['empty_text']


def test_a_byte_order_mark_is_no_text(tmp_path):
  text = '\ufeffa bus'.encode()
  downloads.tar(tmp_path / '0.tar', {'a.jpg': _JPEG, 'a.txt': text})
  (record,) = Img2Dataset().read(tmp_path / '0.tar')
  assert record.captions == ('a bus',)


@pytest.mark.parametrize('repeated', [True, False])
def test_parquet_that_decodes_to_far_more_is_not_read(tmp_path, repeated):
  value = bytes(24 << 20)
  values = [value] * 3 if repeated else [value, value + b'1', value + b'2']
  parquet(tmp_path / '0.parquet', jpg=values, caption=['x'] * 3)
  assert (tmp_path / '0.parquet').stat().st_size < 1 << 16
  (error,) = read(tmp_path / '0.parquet')
  assert error.reason == 'too_large'


def test_parquet_with_rows_of_nothing_is_not_read(tmp_path):
  nothing = pyarrow.nulls(1 << 20, pyarrow.binary())
  parquet(tmp_path / '0.parquet', jpg=nothing)
  (error,) = read(tmp_path / '0.parquet')
  assert error.reason == 'too_large' and '1,048,576 rows' in str(error)


def test_cells_are_limited(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, '_MAX_TEXT', 10)
  parquet(tmp_path / '0.parquet', jpg=[_JPEG] * 2, caption=['x' * 11, 'y'])
  error, sample = read(tmp_path / '0.parquet')
  assert error.reason == 'too_large' and 'caption' in str(error)
  assert sample.text(_NAMES, '') == 'y'


def test_spans_beyond_the_caption_are_malformed(tmp_path):
  downloads.pairs(
    tmp_path, ['a bee'], noun_chunks=[[0, 6, 0.1, 0.2, 0.5, 0.6, 0.9]]
  )
  found = list(Img2Dataset(grounded=True).read(tmp_path / '00000.tar'))
  assert reasons(found) == ['malformed'] and 'characters 0 to 6 of 5' in str(
    found[0]
  )
