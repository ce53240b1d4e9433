"""Reads JSON and JSONL files entry by entry, within limits.

What cannot be read is an error in the place of the entry, so that the others
are read all the same.
"""

import codecs
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from qwenvl_jax.data.readers import fields
from qwenvl_jax.errors import BadRecordError, DataError

# Keys of a mapping that say where a picture is.
PICTURE_KEYS = ('image', 'image_url', 'url', 'path')

# Bytes of a line: many times a conversation, and little memory once parsed.
MAX_LINE = 1 << 24


def check_regular(file: pathlib.Path) -> None:
  """Raises DataError for a pipe or device, which would be waited for."""
  if not file.is_file():
    raise DataError(f'{file} is no regular file; put a copy of its data there')


def lines(file: pathlib.Path) -> Iterator[tuple[int, bytes | BadRecordError]]:
  """Yields the number (from 1) and the bytes of every line.

  A byte order mark is left out, and a line beyond `MAX_LINE` is an error.

  Raises:
    DataError: the file cannot be read.
  """
  check_regular(file)
  try:
    with open(file, 'rb') as stream:
      number = 0
      while line := stream.readline(MAX_LINE + 1):
        number += 1
        if number == 1:
          line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) <= MAX_LINE:
          yield number, line
          continue
        while line and not line.endswith(b'\n'):
          line = stream.readline(MAX_LINE)
        yield (
          number,
          BadRecordError(
            'too_long',
            f'{file.name}, line {number}: more than {MAX_LINE:,} bytes; write '
            'one record a line',
          ),
        )
  except OSError as error:
    raise DataError(f'{file} cannot be read ({error.strerror})') from error


def parse(data: bytes, record: str) -> Any:
  """Returns what JSON holds.

  Raises:
    BadRecordError: it is not JSON in UTF-8, or nested too deep.
  """
  try:
    return json.loads(fields.decode(data, record))
  except (ValueError, RecursionError) as error:
    raise BadRecordError('malformed', f'{record}: {error}') from error


def entries(
  root: pathlib.Path, endings: tuple[str, ...] = ('.json', '.jsonl')
) -> Iterator[tuple[str, Any]]:
  """Yields a name and the entry of every JSON and JSONL file of a folder.

  A `.json` file holds a list, one entry, or lines as `.jsonl` does. An entry is
  a `BadRecordError` where there is none to be read.

  Raises:
    DataError: there is no such file, or one cannot be read.
  """
  for file in files(root, endings):
    yield from entries_of(file)


def files(
  root: pathlib.Path, endings: tuple[str, ...] = ('.json', '.jsonl')
) -> list[pathlib.Path]:
  """Returns the JSON and JSONL files of a folder, in order.

  Raises:
    DataError: there is none.
  """
  found = sorted(x for x in root.glob('*') if x.suffix.lower() in endings)
  if not found:
    raise DataError(f'{root} holds no file that ends in {" or ".join(endings)}')
  return found


def entries_of(file: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields what `entries` does, of one file."""
  check_regular(file)
  for number, entry in _entries(file):
    key = entry.get('id') if isinstance(entry, dict) else None
    plain = isinstance(key, (str, int))
    yield f'{file.name}, {key if plain else number}'[:200], entry


def _entries(file: pathlib.Path) -> Iterator[tuple[Any, Any]]:
  if file.suffix.lower() == '.json' and not _is_lines(file):
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
      found = parse(data, str(file))
    except BadRecordError as error:
      raise DataError(f'{error}; write it again, as JSON in UTF-8') from error
    yield from enumerate(found if isinstance(found, list) else [found])
    return
  for number, line in lines(file):
    name = f'line {number}'
    if not isinstance(line, BadRecordError):
      if not line.strip():
        continue
      try:
        line = parse(line, f'{file.name}, {name}')
      except BadRecordError as error:
        line = error
    yield name, line


def _is_lines(file: pathlib.Path) -> bool:
  """Returns whether the first line of a file is an entry of its own."""
  for _, line in lines(file):
    if isinstance(line, BadRecordError):
      return False
    if line.strip():
      try:
        return isinstance(parse(line, ''), dict)
      except BadRecordError:
        return False
  return False


def is_nothing(value: Any) -> bool:
  """Returns whether a value is None or what pandas writes in its place."""
  return value is None or (isinstance(value, float) and value != value)


def picture_path(value: Any, record: str) -> str:
  """Returns the path of a picture: text, or under a key of a mapping.

  Raises:
    BadRecordError: there is none.
  """
  while isinstance(value, dict):
    value = next((value[x] for x in PICTURE_KEYS if value.get(x)), None)
  if not isinstance(value, str) or not value.strip():
    raise BadRecordError(
      'malformed', f'{record}: a picture is {value!r:.60}, not the path of one'
    )
  return value.removeprefix('file://')
