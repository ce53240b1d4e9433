"""JSON files with known keys, types and ranges: read, checked, told in a line.

A schema is a dict from key to `Field`; `check` gives the values of all of them.
"""

import collections
import dataclasses
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qwenvl_jax import buckets
from qwenvl_jax.errors import CheckpointError

# The index of a hundred thousand tensors has about this many bytes.
_LIMIT = 2**24

_REQUIRED = object()


class Whole(NamedTuple):
  """A whole number from `low` to `high`."""

  low: int
  high: int

  def fits(self, value: Any) -> bool:
    return type(value) is int and self.low <= value <= self.high

  def __str__(self):
    if self.low == self.high:
      return str(self.low)
    return f'a whole number from {self.low:,} to {self.high:,}'


class Real(NamedTuple):
  """A number from `low` to `high`."""

  low: float
  high: float

  def fits(self, value: Any) -> bool:
    return type(value) in (int, float) and self.low <= value <= self.high

  def __str__(self):
    return f'a number from {self.low:g} to {self.high:g}'


class Flag(NamedTuple):
  """`true` or `false`."""

  def fits(self, value: Any) -> bool:
    return type(value) is bool

  def __str__(self):
    return 'true or false'


class Text(NamedTuple):
  """A string; one of `choices`, if there are any."""

  choices: tuple[str, ...] = ()

  def fits(self, value: Any) -> bool:
    known = not self.choices or value in self.choices
    return isinstance(value, str) and known

  def __str__(self):
    return ' or '.join(map(repr, self.choices)) or 'a string'


class Object(NamedTuple):
  """An object with a schema of its own."""

  schema: 'Mapping[str, Field]'

  def fits(self, value: Any) -> bool:
    return isinstance(value, dict)

  def __str__(self):
    return 'an object'


class Names(NamedTuple):
  """An object whose values are names of files beside this one."""

  def fits(self, value: Any) -> bool:
    return isinstance(value, dict) and all(map(self.is_name, value.values()))

  def is_name(self, value: Any) -> bool:
    return (
      isinstance(value, str)
      and value.isprintable()
      and value == Path(value).name
      and len(value) < 250
      and value != '..'
    )

  def __str__(self):
    return 'an object that names a file of this folder for each tensor'


@dataclasses.dataclass(frozen=True)
class Field:
  """One key of a JSON object.

  Attributes:
    kind: what its value must be.
    default: if the key is absent or null; without one it must be there.
  """

  kind: Whole | Real | Flag | Text | Object | Names
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
        f'{where}: {key} is {reprlib.repr(value)}, not {field.kind}; correct '
        'it, or copy the file again'
      )
    if isinstance(field.kind, Object):
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
