"""What readers have in common: annotation files and their fields."""

import collections
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from math import isfinite
from typing import Any, BinaryIO

from qwenvl_jax import buckets
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError, DataError

Found = Iterator[Record | BadRecordError]

# Bytes of a line of JSON or text. A longer one holds no record to learn from.
MAX_LINE = 16 << 20


class Reader:
  """What lies in a download folder; see `readers`.

  Attributes:
    files: names that have to be there.
    folder: where the pictures are that records name.
  """

  files: tuple[str, ...] = ()
  folder: str

  def images_in(self, root: pathlib.Path) -> pathlib.Path:
    return root / self.folder

  def parts(self, root: pathlib.Path) -> list[pathlib.Path] | None:
    """What shards are made of, each by `read`; None if `records` gives all."""
    del root
    return None


class Annotated(Reader):
  """A data set whose annotations, in one file, name pictures in a folder.

  Attributes:
    file: the annotations.
    folder: where the pictures are; '' for the download folder.
    at: key of the list of entries; '' if the file is the list (or a dict).
  """

  file: str
  at = ''

  @property
  def files(self) -> tuple[str, ...]:
    """What has to be there."""
    return tuple(x for x in (self.file, self.folder) if x)

  def records(self, root: pathlib.Path) -> Found:
    """Yields what the entries of the file hold."""
    found = field(load_json(root, self.file), self.at, self.file)
    for key, entry in entries(found):
      record = f'{self.file}, {key}'
      yield from guarded(self._entry(key, entry, record), record)

  def _entry(self, key: str, entry: Any, record: str) -> Iterator:
    """What an entry holds; `record` names it in errors."""
    raise NotImplementedError


def files(
  root: pathlib.Path, endings: tuple[str, ...], pattern: str = '*'
) -> list[pathlib.Path]:
  """Returns the files of a folder that have one of some endings, in order.

  Raises:
    DataError: there is none.
  """
  found = sorted(
    x
    for x in root.glob(pattern)
    # What macOS lays beside each file begins with a dot.
    if x.name.lower().endswith(endings) and x.name[0] != '.'
  )
  if not found:
    raise DataError(f'{root} holds no file that ends in {" or ".join(endings)}')
  return found


def load_json(root: pathlib.Path, name: str) -> Any:
  """The contents of an annotation file.

  Raises:
    DataError: it is missing, or not JSON in UTF-8.
  """
  file = root / name
  try:
    with buckets.open_regular(file) as stream:
      return json.loads(stream.read())
  except OSError as error:
    raise DataError(
      f'{file} cannot be read ({error.strerror}); `qwenvl-data prepare --help` '
      'tells how to see what belongs into the folder'
    ) from error
  except (ValueError, RecursionError) as error:
    raise DataError(
      f'{file} is not JSON in UTF-8 ({error}); download it again'
    ) from error


def attempt(make: Callable, *arguments, record: str) -> Found:
  """Yields what a function makes, or why the record cannot be used."""
  return guarded((make(*arguments) for _ in (0,)), record)


def guarded(found: Iterator, record: str) -> Found:
  """Yields what a generator finds in a record, and why if it fails.

  Fields of another type than the format has fail anywhere, in any way: each
  makes the record malformed, and none ends the reading of the others.
  """
  try:
    yield from found
  except BadRecordError as error:
    yield error
  except (
    AttributeError, TypeError, ValueError, LookupError, ArithmeticError,
    RecursionError,
  ) as error:  # fmt: skip
    yield BadRecordError('malformed', f'{record}: {error!r:.300}')


def entries(found: Any) -> Iterator[tuple[str, Any]]:
  """Yields the entries of a dict with their keys, or of a list, numbered.

  Raises:
    TypeError: it is neither.
  """
  if isinstance(found, dict):
    yield from found.items()
  elif isinstance(found, list):
    yield from ((str(number), x) for number, x in enumerate(found))
  else:
    raise TypeError(f'{found!r:.80} is no list')


def lines(
  file: BinaryIO, name: str
) -> Iterator[tuple[str, bytes | BadRecordError]]:
  """Yields the lines of a file with what errors call them.

  An error stands for a line of more than `MAX_LINE` bytes.
  """
  for number in itertools.count(1):
    line, record = file.readline(MAX_LINE + 1), f'{name}, line {number}'
    if not line:
      return
    if len(line) <= MAX_LINE:
      yield record, line
      continue
    while len(line) > MAX_LINE and not line.endswith(b'\n'):
      line = file.readline(MAX_LINE + 1)
    yield (
      record,
      BadRecordError(
        'too_large', f'{record}: more than {MAX_LINE:,} bytes; divide it'
      ),
    )


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
  what = repr(key) if key else 'the value'
  if value is not None and is_missing(value):
    raise BadRecordError('empty_text', f'{record}: {what} is {value}')
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise BadRecordError('malformed', f'{record}: {what} is not text')
  if not value.strip():
    raise BadRecordError('empty_text', f'{record}: {what} is empty')
  return value.strip()


def is_missing(value: Any) -> bool:
  """Whether there is no value: None, or NaN, by which pandas says so."""
  return value is None or (isinstance(value, float) and not isfinite(value))


def decode(data: bytes, record: str) -> str:
  """Bytes as text, without the byte order mark that some editors write.

  Raises:
    BadRecordError: not UTF-8.
  """
  try:
    return data.decode('utf-8-sig')
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
