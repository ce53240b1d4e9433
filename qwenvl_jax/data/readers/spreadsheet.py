"""Questions about pictures in a spreadsheet, saved as CSV."""

import csv
import dataclasses
import pathlib
from collections.abc import Iterator

from qwenvl_jax.data.readers import fields, json_lines
from qwenvl_jax.data.readers.conversations import conversation
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError, DataError

# What a column may be called; the first that is there counts.
COLUMNS = {
  'picture': ('picture', 'image', 'photo', 'file', 'filename', 'path'),
  'question': ('question', 'prompt', 'instruction'),
  'answer': ('answer', 'response', 'caption', 'label'),
}
# What spreadsheets put between cells, by the language of their user.
_DELIMITERS = ',;\t'
# Characters of a cell.
_MAX_CELL = 2**17


@dataclasses.dataclass(frozen=True)
class Spreadsheet(fields.Reader):
  """Every `.csv` and `.tsv` file of a folder: a picture's question a row.

  The first row names the columns, in any order and case, others beside them:

    picture,question,answer
    photos/1.jpg,What is this?,A zebra finch.

  Attributes:
    folder: where the pictures are that the rows name.
  """

  folder: str = ''

  def records(self, root: pathlib.Path) -> fields.Found:
    """Yields a record for each row that is not blank.

    Raises:
      DataError: a file is not UTF-8, or has no column of a kind.
    """
    for file in fields.files(root, ('.csv', '.tsv')):
      for record, row in _rows(file):
        yield from fields.attempt(_record, row, record, record=record)


def _record(row: dict[str, str] | BadRecordError, record: str) -> Record:
  if isinstance(row, BadRecordError):
    raise row
  for column in COLUMNS:
    fields.text_field(row, column, record)
  turns = [
    {'from': 'user', 'value': f'<image>\n{row["question"]}'},
    {'from': 'assistant', 'value': row['answer']},
  ]
  entry = {'image': row['picture'], 'conversations': turns}
  return conversation(entry, record)


def _rows(
  file: pathlib.Path,
) -> Iterator[tuple[str, dict[str, str] | BadRecordError]]:
  """Yields a name for each row, and its cells by the keys of `COLUMNS`."""
  first = next(_lines(file), '')
  delimiter = max(_DELIMITERS, key=first.count)
  reader = csv.reader(_lines(file), delimiter=delimiter)
  places = _places(next(reader, []), file)
  while True:
    record = f'{file.name}, row {reader.line_num + 1}'
    # It holds for the whole process, and libraries (scipy) lift it.
    csv.field_size_limit(_MAX_CELL)
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      yield record, BadRecordError('malformed', f'{record}: {error}')
      continue
    if not any(x.strip() for x in cells):
      continue
    if len(cells) <= max(places.values()):
      text = f'{record}: {len(cells)} cells, fewer than columns'
      yield record, BadRecordError('malformed', text)
      continue
    yield record, {key: cells[at].strip() for key, at in places.items()}


def _places(header: list[str], file: pathlib.Path) -> dict[str, int]:
  """The place in a row of each kind of column."""
  names = [name.strip().lower() for name in header]
  places = {
    kind: names.index(name)
    for kind, known in COLUMNS.items()
    for name in reversed(known)
    if name in names
  }
  missing = [kind for kind in COLUMNS if kind not in places]
  if missing:
    raise DataError(
      f'{file}: no column {" and no column ".join(missing)}; its first row '
      f'must name them, and is {", ".join(header)[:200]!r}'
    )
  return places


def _lines(file: pathlib.Path) -> Iterator[str]:
  for record, line in json_lines.lines(file):
    if isinstance(line, BadRecordError):
      raise DataError(str(line))
    try:
      yield fields.decode(line, record)
    except BadRecordError as error:
      raise DataError(
        f'{error}; save the spreadsheet as "CSV UTF-8"'
      ) from error
