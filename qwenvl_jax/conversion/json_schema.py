"""JSON files with known keys, types and ranges: read, checked, told in a line.

A schema is a dict from key to `Field`; `check` gives the values of all of them.
"""

import collections
import dataclasses
import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_jax import buckets
from qwenvl_jax.errors import CheckpointError

# The index of a hundred thousand tensors has about this many bytes.
_LIMIT = 2**24

_REQUIRED = object()


class Kind(NamedTuple):
  """What a value may be.

  Attributes:
    fits: tells whether a value may be it.
    meaning: for messages.
    schema: of an object's own keys.
  """

  fits: Callable[[Any], bool]
  meaning: str
  schema: 'Schema | None' = None


def whole(low: int, high: int) -> Kind:
  """Gives the kind of whole numbers from `low` to `high`."""
  meaning = f'a whole number from {low:,} to {high:,}'
  return Kind(lambda x: type(x) is int and low <= x <= high, meaning)


def real(low: float, high: float) -> Kind:
  """Gives the kind of numbers from `low` to `high`."""
  meaning = f'a number from {low:g} to {high:g}'
  return Kind(lambda x: type(x) in (int, float) and low <= x <= high, meaning)


def one_of(*choices: int | str) -> Kind:
  """Gives the kind of values that are one of a few."""
  types = set(map(type, choices))
  return Kind(
    lambda x: type(x) in types and x in choices, ' or '.join(map(repr, choices))
  )


def an_object(schema: 'Schema') -> Kind:
  """Gives the kind of objects with a schema of their own."""
  return Kind(lambda x: isinstance(x, dict), 'an object', schema)


FLAG = Kind(lambda x: type(x) is bool, 'true or false')

TEXT = Kind(lambda x: isinstance(x, str), 'a string')

TEXTS = Kind(
  lambda x: isinstance(x, list) and all(isinstance(i, str) for i in x),
  'a list of strings',
)


def _is_file_name(value: Any) -> bool:
  return (
    isinstance(value, str)
    and value.isprintable()
    and value == Path(value).name
    and value != '..'
    and len(value) < 250
  )


FILE_NAMES = Kind(
  lambda x: isinstance(x, dict) and all(map(_is_file_name, x.values())),
  'an object that names a file of this folder for each tensor',
)


@dataclasses.dataclass(frozen=True)
class Field:
  """One key of a JSON object.

  Attributes:
    kind: what its value must be.
    default: if the key is absent or null; without one it must be there.
  """

  kind: Kind
  default: Any = _REQUIRED


Schema = Mapping[str, Field]


def check(raw: dict, schema: Schema, where: str) -> dict[str, Any]:
  """Checks an object.

  Args:
    raw: the object; keys that the schema does not have are left alone.
    schema: what it must hold.
    where: the file and, within it, the place; for messages.

  Returns:
    The value of each key of the schema.

  Raises:
    CheckpointError: a key is missing, or has another type or range.
  """
  values = {}
  for key, field in schema.items():
    value = raw.get(key)
    if value is None and field.default is not _REQUIRED:
      values[key] = field.default
      continue
    if key not in raw:
      raise CheckpointError(
        f'{where}: key {key!r} is missing; copy the file of the release again'
      )
    if not field.kind.fits(value):
      raise CheckpointError(
        f'{where}: {key} is {reprlib.repr(value)}, not {field.kind.meaning}; '
        'correct '
        'it, or copy the file again'
      )
    if field.kind.schema is not None:
      value = check(value, field.kind.schema, f'{where}: {key}')
    values[key] = value
  return values


def read_json(path: Path) -> dict:
  """Parses a JSON file that holds an object.

  Raises:
    CheckpointError: the file is absent, too long, no regular file or not JSON.
  """
  try:
    text = buckets.read(path, _LIMIT)
  except FileNotFoundError as error:
    raise CheckpointError(
      f'{path} does not exist: is this the whole checkpoint folder?'
    ) from error
  except OSError as error:
    raise CheckpointError(
      f'{path} cannot be read ({error.strerror or error})'
    ) from error
  content = parse(text, str(path))
  if not isinstance(content, dict):
    raise CheckpointError(f'{path} does not hold a JSON object')
  return content


def parse(text: bytes, where: str, what: str = 'key') -> Any:
  """Parses JSON in UTF-8 in which no key stands twice.

  Args:
    text: the JSON.
    where: its file, for messages.
    what: a key stands for.

  Raises:
    CheckpointError: it is not JSON, is nested without end, or a key is double.
  """

  def unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
      counts = collections.Counter(name for name, _ in pairs)
      twice = counts.most_common(1)[0][0][:200]
      raise CheckpointError(f'{where}: {what} {twice} stands in it twice')
    return found

  try:
    return json.loads(text.decode(), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    reason = str(error) if isinstance(error, ValueError) else 'nested too deep'
    raise CheckpointError(
      f'{where} is not valid JSON ({reprlib.repr(reason)[1:-1]}); copy the '
      'file again'
    ) from error
