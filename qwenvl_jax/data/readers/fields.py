"""What readers have in common: annotation files and their fields."""

import collections
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError, DataError

Found = Iterator[Record | BadRecordError]


def load_json(root: pathlib.Path, name: str) -> Any:
  """The contents of an annotation file.

  Raises:
    DataError: it is missing, or not JSON in UTF-8.
  """
  file = root / name
  try:
    return json.loads(file.read_bytes())
  except OSError as error:
    raise DataError(
      f'{file} cannot be read ({error.strerror}); `qwenvl-data prepare --help` '
      'tells how to see what belongs into the folder'
    ) from error
  except ValueError as error:
    raise DataError(
      f'{file} is not JSON in UTF-8 ({error}); download it again'
    ) from error


def field(entry: Any, key: Any, record: str) -> Any:
  """`entry[key]`, or `entry` itself for ''.

  Raises:
    BadRecordError: there is none.
  """
  if key == '':
    return entry
  try:
    return entry[key]
  except (KeyError, TypeError, IndexError):
    raise BadRecordError('malformed', f'{record}: no {key!r}') from None


def text_field(entry: Any, key: str, record: str) -> str:
  """As `field`, text that is not empty; numbers become text.

  Raises:
    BadRecordError: none, empty, or something else.
  """
  value = field(entry, key, record)
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise BadRecordError('malformed', f'{record}: {key!r} is not text')
  if not value.strip():
    raise BadRecordError('empty_text', f'{record}: {key!r} is empty')
  return value.strip()


def decode(data: bytes, record: str) -> str:
  """Bytes as text.

  Raises:
    BadRecordError: not UTF-8.
  """
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise BadRecordError('invalid_utf8', f'{record}: {error}') from error


def corners(box: Iterable[float], record: str) -> tuple:
  """x, y, width, height -> x1, y1, x2, y2.

  Raises:
    BadRecordError: not four numbers.
  """
  x, y, width, height = numbers(box, 4, record)
  return x, y, x + width, y + height


def numbers(values: Any, count: int, record: str) -> tuple[float, ...]:
  """So many numbers.

  Raises:
    BadRecordError: something else.
  """
  try:
    found = tuple(map(float, values))
  except (TypeError, ValueError, OverflowError):
    found = ()
  if len(found) != count:
    raise BadRecordError(
      'malformed', f'{record}: {values!r:.80} are not {count} numbers'
    )
  return found


def size(entry: Any, record: str) -> tuple[int, int]:
  """`width` and `height` of a picture.

  Raises:
    BadRecordError: missing, or no size that a picture can have.
  """
  given = [field(entry, key, record) for key in ('width', 'height')]
  width, height = numbers(given, 2, record)
  if not (1 <= width < 1e6 and 1 <= height < 1e6):
    raise BadRecordError('malformed', f'{record}: a picture of {given!r:.80}')
  return int(width), int(height)


def by_image(
  entries: Iterable[tuple[str, Any]],
) -> dict[str, list[Any]]:
  """Everything about each image, in order of first mention."""
  grouped = collections.defaultdict(list)
  for image, entry in entries:
    grouped[image].append(entry)
  return grouped
