import io
import os

import downloads
import pytest

from qwenvl_jax.data.readers import fields
from qwenvl_jax.errors import BadRecordError, DataError


def test_a_line_beyond_the_limit_is_passed_over(monkeypatch):
  monkeypatch.setattr(fields, 'MAX_LINE', 8)
  data = b'1234567\n' + b'x' * 8 + b'\n' + b'x' * 30 + b'\n\nlast'
  found = dict(fields.lines(io.BytesIO(data), 'f'))
  assert found.pop('f, line 2').reason == 'too_large'
  assert 'f, line 3: more than 8' in str(found.pop('f, line 3'))
  assert found == {
    'f, line 1': b'1234567\n', 'f, line 4': b'\n', 'f, line 5': b'last',
  }  # fmt: skip
  (only,) = fields.lines(io.BytesIO(b'x' * 99), 'f')
  assert isinstance(only[1], BadRecordError)


@pytest.mark.parametrize(
  'error', [TypeError('x'), KeyError('x'), ValueError('x'), OverflowError('x'),
            IndexError('x'), AttributeError('x'), RecursionError('x')],
)  # fmt: skip
def test_what_a_record_raises_is_its_own_error(error):
  def found():
    yield 1
    raise error

  first, bad = fields.guarded(found(), 'r')
  assert first == 1 and bad.reason == 'malformed' and str(bad)[0] == 'r'

  def broken():
    raise RuntimeError('of the program')

  with pytest.raises(RuntimeError):
    list(fields.attempt(broken, record='r'))


def test_annotations_that_cannot_be_read_to_an_end(tmp_path):
  os.mkfifo(tmp_path / 'pipe.json')
  with pytest.raises(DataError, match='not a regular file'):
    fields.load_json(tmp_path, 'pipe.json')
  downloads.write(tmp_path, 'deep.json', b'[' * 100_000)
  with pytest.raises(DataError, match=r'deep\.json is not JSON'):
    fields.load_json(tmp_path, 'deep.json')
  downloads.write(tmp_path, 'mark.json', b'\xef\xbb\xbf{"a": 1}')
  assert fields.load_json(tmp_path, 'mark.json') == {'a': 1}


def test_no_text(tmp_path):
  for value, reason in (
    (float('nan'), 'empty_text'),
    (float('inf'), 'empty_text'),
    (' ', 'empty_text'),
    (None, 'malformed'),
    ([], 'malformed'),
    (True, 'malformed'),
  ):
    with pytest.raises(BadRecordError) as caught:
      fields.text_field({'a': value}, 'a', 'r')
    assert caught.value.reason == reason
  assert fields.text_field({'a': 7}, 'a', 'r') == '7'
