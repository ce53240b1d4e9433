"""Errors that a person can act on.

Each message names the thing that is wrong (file, record, key) and the remedy.
Entry points print the message without a traceback and exit with status 2; any
other exception is a bug and keeps its traceback.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

# A terminal obeys these instead of showing them; lines and tabs may stay.
_CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')


class QwenVLError(Exception):
  """Base of every error caused by input rather than by this package."""


class ConfigError(QwenVLError):
  """A configuration that cannot be run as written."""


class CheckpointError(QwenVLError):
  """A checkpoint that is missing, damaged or of another model."""


class DataError(QwenVLError):
  """A record, image or data folder that cannot be used."""


class BadRecordError(DataError):
  """A record that cannot be used, and why.

  Attributes:
    reason: a key of `data.record_errors.DROPPED`, which is counted by it.
  """

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason

  def __reduce__(self):
    return BadRecordError, (self.reason, str(self))


def check_fields(
  config: Any, fits: Callable[[Any], bool], rule: str, *names: str
) -> None:
  """Raises ConfigError for a field that is set and breaks a rule, in words."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not fits(value):
      raise ConfigError(f'{type(config).__name__}.{name}={value} {rule}')


def check_at_least_1(config: Any, *names: str) -> None:
  """Raises ConfigError for a field that is set and below 1."""
  check_fields(config, lambda x: x >= 1, 'must be at least 1', *names)


def printable(text: str) -> str:
  """Spells out control characters of a text for a terminal.

  Names of files, tensors and keys are other people's: an ESC in them would
  recolour, retitle or rewrite what a terminal shows.
  """
  return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def did_you_mean(
  name: str, known: Iterable[str], also: Iterable[str] = ()
) -> str:
  """The end of a message about a name that does not exist.

  Args:
    also: what else may have been meant.

  Returns:
    What is close, or all that is known if that is little, or nothing.
  """
  names = {x.lower(): x for x in sorted(set(known))}
  for cutoff in (0.75, 0.5):  # Beside what is close, the far only confuses.
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=cutoff)
    if near:
      break
  meant = dict.fromkeys([*(names[x] for x in near), *also])
  if meant:
    return f'; did you mean {" or ".join(meant)}?'
  few = 0 < len(names) <= 12
  return f'; there is {", ".join(names.values())}' if few else ''
