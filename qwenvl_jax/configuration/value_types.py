"""Whether a value of a config file fits the annotation of its parameter."""

import collections.abc
import functools
import inspect
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

# JAX, NumPy and checkpoints hold no larger whole numbers.
_INT_LIMIT = 2**63

_SMALLEST, _LARGEST = 1.2e-38, 3.4e38

_WORDS = {
  bool: 'True or False',
  int: 'a whole number, without a point, below 2**63',
  float: 'a number that float32 holds',
  str: 'a string in quotes',
  type(None): 'None',
}


class Made:
  """A value that a configured class or function will make.

  Attributes:
    kind: its class; Any where that is not said.
  """

  def __init__(self, kind: Any):
    self.kind = typing.get_origin(kind) or kind

  def __repr__(self):
    return f'an object of {getattr(self.kind, "__name__", self.kind)}'


@functools.cache
def hints(target: Any) -> dict[str, Any]:
  """Annotations of what a class or function is called with, by name."""
  # A class has a field's annotation, a function or __init__ a parameter's.
  has_fields = inspect.isclass(target) and hasattr(
    target, '__dataclass_fields__'
  )
  function = target.__init__ if inspect.isclass(target) else target
  try:
    return typing.get_type_hints(target if has_fields else function)
  except (NameError, TypeError, AttributeError):
    return {}  # Written for readers only.


def fits(value: Any, hint: Any) -> bool:
  """Whether a value may be given where `hint` is annotated.

  Args:
    value: literals, lists, tuples and dicts of them, and `Made`.
    hint: from `hints`; what is not understood fits.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return True
  if origin in (typing.Union, types.UnionType):
    return any(fits(value, arg) for arg in args)
  if origin is typing.Annotated:
    return fits(value, args[0])
  if origin is typing.Literal:
    return value in args
  if hint is None or hint is type(None):
    return value is None
  if isinstance(value, Made):
    return _made_fits(value.kind, origin or hint)
  if hint is bool:
    return isinstance(value, bool)
  if hint is int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and abs(value) < _INT_LIMIT
  if hint is float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # Others become 0 or infinite where they are used, in float32.
    return number and (value == 0 or _SMALLEST < abs(value) < _LARGEST)
  if hint in (str, os.PathLike) or origin is os.PathLike:
    return isinstance(value, str) and '\0' not in value
  kind = origin or hint
  if not inspect.isclass(kind) or kind is object:
    return True
  if issubclass(kind, Mapping):
    return isinstance(value, dict) and (
      len(args) != 2
      or all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    )
  if kind is tuple and args and args[-1] is not Ellipsis:
    # A fixed number of things, each of its own type.
    return (
      isinstance(value, list | tuple)
      and len(value) == len(args)
      and all(map(fits, value, args))
    )
  if kind in (tuple, list) or kind in (
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
  ):
    return isinstance(value, list | tuple) and all(
      fits(item, args[0]) for item in value if args
    )
  # A class of ours is made by a reference; of others', nothing is known.
  ours = (kind.__module__ or '').partition('.')[0] == 'qwenvl_jax'
  return isinstance(value, kind) if not _is_protocol(kind) else not ours


def _made_fits(kind: Any, hint: Any) -> bool:
  if not inspect.isclass(hint) or not inspect.isclass(kind):
    return True
  if hint in (bool, int, float, str, bytes) or hint is os.PathLike:
    return issubclass(kind, hint)
  if _is_protocol(hint):
    return kind not in (bool, int, float, str, bytes, type(None))
  return issubclass(kind, hint)


def _is_protocol(kind: type) -> bool:
  return bool(getattr(kind, '_is_protocol', False))


def describe(hint: Any) -> str:
  """What a parameter takes, in words."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(dict.fromkeys(describe(arg) for arg in args))
  if origin is typing.Literal:
    return ' or '.join(map(repr, args))
  if hint is os.PathLike or origin is os.PathLike:
    return _WORDS[str]
  if origin in (tuple, list, collections.abc.Sequence) and args:
    if args[-1] is Ellipsis or len(args) == 1:
      return f'a list, each {describe(args[0])}'
    return f'a list of {len(args)}: {", ".join(map(describe, args))}'
  if origin and issubclass(origin, Mapping) and len(args) == 2:
    return f'a dict of {describe(args[0])}: {describe(args[1])}'
  return _WORDS.get(hint) or f'a {getattr(hint, "__name__", hint)}'
