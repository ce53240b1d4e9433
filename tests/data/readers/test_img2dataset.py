import downloads
import pyarrow
import pyarrow.parquet
import pytest

from qwenvl_jax.data.readers.img2dataset import Img2Dataset
from qwenvl_jax.errors import BadRecordError, DataError


def _parquet(path, **columns):
  path.parent.mkdir(parents=True, exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _read(root, grounded=False):
  reader = Img2Dataset(grounded=grounded)
  return [x for part in reader.parts(root) for x in reader.read(part)]


def _reasons(found):
  return [x.reason for x in found if isinstance(x, BadRecordError)]


def test_parquet_with_pictures(tmp_path):
  data = downloads.picture()
  _parquet(
    tmp_path / '00000.parquet',
    key=['000000000', '000000001'],
    caption=['a bus', None],
    jpg=[data, data],
  )
  found = _read(tmp_path)
  assert found[0].captions == ('a bus',) and found[0].images == (data,)
  assert _reasons(found) == ['empty_text']


def test_metadata_beside_tar_files_is_no_data(tmp_path):
  downloads.pairs(tmp_path)
  _parquet(tmp_path / '00000.parquet', key=['0'], caption=['x'])
  assert [x.captions[0] for x in _read(tmp_path)] == ['a red bus', 'two cats']


def test_a_list_of_urls_is_named_as_such(tmp_path):
  _parquet(tmp_path / 'urls.parquet', url=['http://a'], caption=['x'])
  with pytest.raises(DataError, match='list of URLs.*img2dataset'):
    _read(tmp_path)
  with pytest.raises(DataError, match='neither .tar nor .parquet'):
    _read(tmp_path / 'urls')


def test_a_tar_that_is_cut_off_keeps_what_is_whole(tmp_path):
  downloads.pairs(tmp_path, ['one', 'two', 'three'])
  file = tmp_path / '00000.tar'
  whole = file.read_bytes()
  for share in range(1, 20):
    file.write_bytes(whole[: len(whole) * share // 20])
    found = _read(tmp_path)
    captions = [x.captions[0] for x in found if hasattr(x, 'captions')]
    assert captions == ['one', 'two', 'three'][: len(captions)]
    assert set(_reasons(found)) <= {
      'unreadable_record', 'empty_text', 'missing_image',
    }  # fmt: skip
    assert len(captions) == 3 or _reasons(found)


def test_a_parquet_that_is_cut_off_is_one_bad_record(tmp_path):
  file = tmp_path / '0.parquet'
  _parquet(file, key=['0'], caption=['x'], jpg=[b'y'])
  file.write_bytes(file.read_bytes()[:-20])
  assert _reasons(_read(tmp_path)) == ['unreadable_record']


def test_bad_pairs_of_an_archive(tmp_path):
  data = downloads.picture()
  files = {
    'a.jpg': data, 'a.txt': b'\xff\xfe broken',
    'b.jpg': data, 'b.txt': b' \n', 'c.txt': b'no picture',
    'd.jpg': data, 'd.json': b'{', 'd.txt': b'after',
    '../../e.jpg': data, '../../e.txt': 'fünf 五'.encode(),
  }  # fmt: skip
  downloads.tar(tmp_path / '0.tar', files)
  found = _read(tmp_path)
  assert _reasons(found)[:4] == [
    'invalid_utf8', 'empty_text', 'missing_image', 'malformed',
  ]  # fmt: skip
  assert found[-1].captions == ('fünf 五',) and found[-1].id == '0.tar/e'


@pytest.mark.parametrize(
  'metadata', [{'noun_chunks': [[0, 5]]}, {'noun_chunks': 'x'}, {'width': 'w'}]
)
def test_malformed_boxes(tmp_path, metadata):
  downloads.pairs(tmp_path, ['a bee'], **metadata)
  assert _reasons(_read(tmp_path, grounded=True)) == ['malformed']


def test_grit_lists_may_be_text(tmp_path):
  downloads.pairs(tmp_path, ['a bee'], ref_exps='[[0,5,0,0,0.5,0.5,0.9]]')
  (found,) = _read(tmp_path, grounded=True)
  assert found.regions[0].boxes == ((0, 0, 20, 15),)
