import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval.annotations.rows import rows


def read(tmp_path, data, *columns, **options):
  file = tmp_path / 'table.csv'
  file.write_bytes(data)
  return [row for _, row in rows(file, columns, **options)]


def test_cells_as_they_are_quoted(tmp_path):
  data = '\ufeffa,b\r\n"one, ""two""\nthree", 4 \r\n\r\n五,\r\n'.encode()
  assert read(tmp_path, data, 'a') == [
    {'a': 'one, "two"\nthree', 'b': '4'},
    {'a': '五', 'b': ''},
  ]


def test_pictures_are_longer_than_csv_reads_by_itself(tmp_path):
  data = b'a\tb\n1\t' + b'x' * 3_000_000 + b'\n'
  [row] = read(tmp_path, data, delimiter='\t')
  assert len(row['b']) == 3_000_000


def test_tables_without_names(tmp_path):
  assert read(tmp_path, b'1,2\n', names=('a', 'b')) == [{'a': '1', 'b': '2'}]


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'', 'is empty'),
    (b'a,c\n1,2\n', "no column 'b' among a, c"),
    (b'a,b\n1,2\n3\n', 'table.csv, line 3: 1 cells where there are 2'),
    (b'a,b\n1,\xff\n', 'line 2: not UTF-8'),
    (b'a,b\n1,\x002\n', 'line 2: a zero byte'),
    (b'a,b\n' + b'x' * (17 << 20), 'line 2: more than'),
  ],
)
def test_what_is_wrong_is_named(tmp_path, data, message):
  with pytest.raises(DataError, match=message):
    read(tmp_path, data, 'a', 'b')


def test_there_is_no_file(tmp_path):
  with pytest.raises(DataError, match='cannot be read'):
    list(rows(tmp_path / 'no.csv'))
