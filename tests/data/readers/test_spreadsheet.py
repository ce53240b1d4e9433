"""A spreadsheet of one's own becomes conversations."""

import csv

import pytest

from qwenvl_jax.data.readers.spreadsheet import Spreadsheet
from qwenvl_jax.data.records import Turn
from qwenvl_jax.errors import BadRecordError, DataError


def _read(folder, text, name='mine.csv'):
  data = text if isinstance(text, bytes) else text.encode()
  (folder / name).write_bytes(data)
  return list(Spreadsheet().records(folder))


TURNS = (
  Turn('user', 'Picture 1: <img>photos/1.jpg</img>\nWhat is this?'),
  Turn('assistant', 'A finch,\non a twig.'),
)


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    (
      'mine.csv',
      'picture,question,answer\n'
      'photos/1.jpg,What is this?,"A finch,\non a twig."\n',
    ),
    (
      # As Excel saves it in Germany, with a column of one's own.
      'mine.csv',
      '\ufeffLabel;Who;Image;Question\r\n'
      '"A finch,\non a twig.";me;photos/1.jpg;What is this?\r\n;;;\r\n',
    ),
    (
      'mine.tsv',
      'file\tprompt\tresponse\n'
      'photos/1.jpg\tWhat is this?\t"A finch,\non a twig."\n',
    ),
  ],
)
def test_rows_become_conversations(name, text, tmp_path):
  (record,) = _read(tmp_path, text, name)
  assert record.turns == TURNS
  assert record.images == ('photos/1.jpg',)


def test_bad_rows_are_named_and_others_read(tmp_path):
  # As scipy does when it is imported.
  csv.field_size_limit(2**62)
  rows = ['picture,question,answer', 'a.jpg,What?,', 'a.jpg,What?', 'a,b,c']
  rows += ['a.jpg,What?,Is <box>(1)</box>', f'a.jpg,What?,{"x" * 200_000}']
  rows += ['a.jpg,What?,A cat.']
  found = _read(tmp_path, '\n'.join(rows))
  bad = [x for x in found if isinstance(x, BadRecordError)]
  assert [str(x).split(':')[0] for x in bad] == [
    f'mine.csv, row {n}' for n in (2, 3, 5, 6)
  ]
  assert bad[0].reason == 'empty_text'
  assert [x.turns[1].text for x in found if x not in bad] == ['c', 'A cat.']


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('picture,answer\na.jpg,A cat.\n', 'no column question; .*picture, answer'),
    ('', 'no column picture and no column question'),
    ('picture,question,answer\na.jpg,Où?,là\n'.encode('latin-1'), 'CSV UTF-8'),
  ],
)
def test_no_table(text, message, tmp_path):
  with pytest.raises(DataError, match=message):
    _read(tmp_path, text)
