import json

import corpus
import pyarrow
import pyarrow.parquet
import pytest

from qwenvl_jax.data.cleaning.inputs import Source
from qwenvl_jax.data.cleaning.pair import Outcome, Pair
from qwenvl_jax.errors import DataError


def read(path, **fields):
  (shard,) = Source(name='web', files=str(path), **fields).shards()
  return list(shard.read())


def reasons(records):
  return [x.reason if isinstance(x, Outcome) else '' for x in records]


def test_tar(tmp_path):
  path = tmp_path / '00000.tar'
  corpus.write_tar(
    path,
    [
      ('a/1', 'a cat', corpus.jpeg(1), 0.31),
      ('a/2', None, corpus.jpeg(2), None),
      ('b/2', b'caf\xe9', corpus.jpeg(2), None),
    ],
  )
  first, *rest = read(path)
  assert first.id == '00000.tar/a/1' and first.text == 'a cat'
  assert first.picture.encoded == corpus.jpeg(1) and first.score == 0.31
  assert reasons(rest) == ['empty_text', 'invalid_utf8']


@pytest.mark.parametrize('cut', [600, 5000, 10240])
def test_a_tar_that_is_cut_off_gives_what_comes_before(tmp_path, cut):
  path = tmp_path / '00000.tar'
  corpus.write_tar(
    path, [(str(i), 'a cat', corpus.jpeg(i), None) for i in range(4)]
  )
  whole = path.read_bytes().rstrip(b'\0')
  path.write_bytes(whole[:-cut])
  found = read(path)
  assert reasons(found)[-1] == 'unreadable_record'
  assert set(reasons(found)[:-1]) <= {''} and len(found) <= 4


def test_parquet(tmp_path):
  path = tmp_path / '00000.parquet'
  rows = [
    {'key': 'k1', 'caption': 'a cat', 'jpg': corpus.jpeg(1), 'similarity': 0.3},
    {'key': 'k2', 'caption': 'a dog', 'jpg': None, 'similarity': None},
  ]
  rows[1]['error_message'] = rows[0]['error_message'] = 'HTTP Error 404'
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  found, broken = read(path)
  assert found.id == '00000.parquet/k1' and found.score == 0.3
  assert broken.reason == 'missing_image' and '404' in broken.detail
  path.write_bytes(path.read_bytes()[:-100])
  assert reasons(read(path)) == ['unreadable_record']


def test_jsonl_opens_nothing_outside_its_folder(tmp_path):
  (tmp_path / 'secret.jpg').write_bytes(corpus.jpeg(1))
  folder = tmp_path / 'data'
  folder.mkdir()
  (folder / 'in.jpg').write_bytes(corpus.jpeg(2))
  (folder / 'link.jpg').symlink_to(tmp_path / 'secret.jpg')
  images = [
    'in.jpg',
    '../secret.jpg',
    str(tmp_path / 'secret.jpg'),
    'link.jpg',
    'missing.jpg',
  ]
  lines = [json.dumps({'text': 'a cat', 'image': x}) for x in images]
  (folder / 'a.jsonl').write_text('\n'.join([*lines, '{broken', '[1]']))
  found = read(folder / 'a.jsonl')
  assert isinstance(found[0], Pair)
  assert reasons(found[1:]) == [
    *['outside_root'] * 3, 'missing_image', 'malformed', 'malformed',
  ]  # fmt: skip


def test_fields_of_ones_own(tmp_path):
  path = tmp_path / 'a.parquet'
  rows = [{'alt': 'a cat', 'photo': {'bytes': corpus.jpeg(1)}, 'fit': '0.5'}]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  (found,) = read(path, pictures=('photo',), texts=('alt',), scores=('fit',))
  assert found.text == 'a cat' and found.score == 0.5


def test_files_that_are_not_there(tmp_path):
  with pytest.raises(DataError, match=r'no file matches .*\.tar'):
    Source(name='web', files=str(tmp_path / '*.tar')).shards()
  (tmp_path / 'a.csv').write_text('x')
  with pytest.raises(DataError, match='unknown format'):
    Source(name='web', files=str(tmp_path / '*')).shards()
