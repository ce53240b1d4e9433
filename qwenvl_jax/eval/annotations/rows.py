"""Rows of tables, comma or tab separated, and pictures in their cells."""

import base64
import binascii
import csv
import pathlib
from collections.abc import Iterator, Sequence

from qwenvl_jax.data.readers import fields, json_lines
from qwenvl_jax.errors import BadRecordError, DataError


def rows(
  file: pathlib.Path,
  columns: Sequence[str] = (),
  *,
  delimiter: str = ',',
  names: Sequence[str] = (),
) -> Iterator[tuple[str, dict[str, str]]]:
  """Yields what errors call a row, and its cells by column.

  Cells are text without outer white space, '' where there is nothing.

  Args:
    columns: that it must have.
    names: of its columns if its first row is not these.

  Raises:
    DataError: it cannot be read, lacks a column, or a row has cells too many
      or too few; names the row.
  """
  lines = _Lines(file)
  # Pictures stand in cells; csv's own limit is too low for them.
  csv.field_size_limit(fields.MAX_LINE)
  reader = csv.reader(lines, delimiter=delimiter)
  header = list(names)
  try:
    for cells in reader:
      if not any(cells):
        continue
      if not header:
        header = [cell.strip() for cell in cells]
        _check_columns(header, columns, file)
        continue
      if len(cells) != len(header):
        raise DataError(
          f'{lines.record}: {len(cells)} cells where there are '
          f'{len(header)} columns; the file may be cut off: download it again'
        )
      texts = (cell.strip() for cell in cells)
      yield lines.record, dict(zip(header, texts, strict=True))
  except csv.Error as error:
    raise DataError(
      f'{lines.record}: {error}; download the file again'
    ) from error
  if not header:
    raise DataError(f'{file} is empty; download it again')


class _Lines:
  """Lines as text; `record` names the last that was read."""

  def __init__(self, file: pathlib.Path):
    self.record = file.name
    self._found = json_lines.lines(file)
    self._first = True

  def __iter__(self):
    return self

  def __next__(self) -> str:
    self.record, line = next(self._found)
    if isinstance(line, BadRecordError):
      raise line
    try:
      text = line.decode('utf-8-sig' if self._first else 'utf-8')
    except UnicodeDecodeError as error:
      raise DataError(f'{self.record}: not UTF-8 ({error})') from error
    self._first = False
    if '\0' in text:
      raise DataError(f'{self.record}: a zero byte; download the file again')
    return text


def _check_columns(header, columns, file) -> None:
  missing = [name for name in columns if name not in header]
  if missing:
    raise DataError(
      f'{file}: no column {missing[0]!r} among {", ".join(header)[:200]}; it '
      'is another file, or another version of it'
    )


def embedded(text: str, record: str) -> bytes:
  """Returns the bytes of a picture in base64.

  Raises:
    DataError: it is not; names the record.
  """
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise DataError(
      f'{record}: its picture is not in base64 ({error}); download the file '
      'again'
    ) from error
