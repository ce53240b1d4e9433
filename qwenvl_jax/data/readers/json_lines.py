"""Reads JSON and JSONL files entry by entry, within limits.

What cannot be read is an error in the place of the entry, so that the others
are read all the same.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.data.readers import fields
from qwenvl_jax.errors import BadRecordError, DataError

# Keys of a mapping that say where a picture is.
PICTURE_KEYS = ('image', 'image_url', 'url', 'path')

# Pictures of a record, which are all in memory at a time.
MAX_PICTURES = 256


def lines(file: pathlib.Path) -> Iterator[tuple[str, bytes | BadRecordError]]:
  """Yields a name and the bytes of every line; an error if it is too long.

  Raises:
    DataError: the file cannot be read.
  """
  try:
    with buckets.open_regular(file) as stream:
      yield from fields.lines(stream, file.name)
  except OSError as error:
    raise DataError(f'{file} cannot be read ({error.strerror})') from error


def parse(line: bytes | BadRecordError, record: str) -> Any:
  """Returns what a line of JSON holds.

  Raises:
    BadRecordError: it is none, not JSON in UTF-8, or nested too deep.
  """
  if isinstance(line, BadRecordError):
    raise line
  try:
    return json.loads(fields.decode(line, record))
  except (ValueError, RecursionError) as error:
    raise BadRecordError('malformed', f'{record}: {error}') from error


def entries(file: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields a name for every entry of a file, and the entry.

  A `.json` file holds a list, one entry, or lines as a `.jsonl` file does. An
  entry that cannot be read is a `BadRecordError`.

  Raises:
    DataError: the file cannot be read.
  """
  if file.suffix.lower() == '.json' and not _is_lines(file):
    found = fields.load_json(file.parent, file.name)
    for number, entry in enumerate(
      found if isinstance(found, list) else [found]
    ):
      yield _name(file, entry, str(number)), entry
    return
  for record, line in lines(file):
    if isinstance(line, bytes) and not line.strip():
      continue
    try:
      entry = parse(line, record)
    except BadRecordError as error:
      entry = error
    yield _name(file, entry, record.removeprefix(f'{file.name}, ')), entry


def _name(file: pathlib.Path, entry: Any, number: str) -> str:
  key = entry.get('id') if isinstance(entry, dict) else None
  name = f'{file.name}, {key if isinstance(key, (str, int)) else number}'[:200]
  # A terminal would obey what it does not print.
  return ''.join(x if x.isprintable() else '?' for x in name)


def _is_lines(file: pathlib.Path) -> bool:
  """Returns whether the first line of a file is an entry of its own."""
  for _, line in lines(file):
    try:
      if isinstance(line, BadRecordError) or line.strip():
        return isinstance(parse(line, ''), dict)
    except BadRecordError:
      break
  return False


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


def check_count(pictures: int, record: str) -> None:
  """Raises BadRecordError if a record names more than `MAX_PICTURES`."""
  if pictures > MAX_PICTURES:
    raise BadRecordError(
      'too_long',
      f'{record}: {pictures:,} pictures, but {MAX_PICTURES} are read at most; '
      'divide it',
    )
