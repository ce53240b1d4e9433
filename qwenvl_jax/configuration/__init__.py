"""Gin configs and overrides, with errors for people.

Only this room knows gin: libraries are plain dataclasses, which config files
name by import (`from __gin__ import dynamic_registration`).
"""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin

from qwenvl_jax.configuration.files import Configuration
from qwenvl_jax.configuration.parsing import CONFIGS, find_config, one_line
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError

__all__ = ['CONFIGS', 'build', 'find_config', 'load', 'resolved']

_loaded = Configuration()


def load(files: Iterable[str], bindings: Sequence[str] = ()) -> None:
  """Replaces gin's configuration by these files and overrides.

  Args:
    files: names of config files, found by `find_config`.
    bindings: 'NAME=VALUE' each, applied last.

  Raises:
    ConfigError: a file, name, parameter or value that does not exist or does
      not fit, with what is close to it.
  """
  global _loaded
  found = Configuration()
  for file in files:
    found.read(find_config(file))
  for binding in bindings:
    found.override(binding)
  found.check()
  gin.clear_config()
  _parse_with_gin(found.texts)
  _loaded = found


def _parse_with_gin(texts: Iterable[io.StringIO]) -> None:
  with gin.unlock_config():
    for text in texts:
      text.seek(0)
      try:
        gin.parse_config(text)
      except (ValueError, NameError, AttributeError, SyntaxError) as error:
        raise ConfigError(f'{text.name}: {one_line(error)}') from error


def build(target: Callable, whole: bool = True) -> Any:
  """Calls a class or function with what the configuration binds to it.

  Args:
    target: the class or function.
    whole: whether the whole configuration must be complete, or only what the
      target needs.

  Raises:
    ConfigError: the configuration does not mention it, or leaves out values
      that it needs.
  """
  if not any(found is target for found in _loaded.named):
    stages = sorted(path.name for path in CONFIGS.glob('*.gin'))
    raise ConfigError(
      f'the configuration says nothing about {target.__name__}: pass a '
      f'--gin_file that does, e.g. one of {stages}'
    )
  names = _loaded.left_open()
  if whole and names:
    raise ConfigError(
      f'the config files leave open: {", ".join(names)}; give '
      + ' '.join(f'--gin.{name}=VALUE' for name in names)
      + ' (what they mean stands beside them in the files)'
    )
  try:
    return gin.get_configurable(target)()
  except QwenVLError as error:
    # Gin adds, on a line of its own, where in the configuration it was called.
    text, added, _ = str(error).partition('\n  In call to configurable')
    if not added:
      raise
    kind = DataError if isinstance(error, DataError) else ConfigError
    raise kind(text) from error
  except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
    # A value is missing, does not fit its class, or is made from itself.
    raise ConfigError(f'the configuration: {one_line(error)}') from error


def resolved() -> str:
  """The whole configuration as one config file, wherever it is read from.

  Relative paths become absolute.
  """
  written = list(_loaded.relative_paths())
  absolute = [b.text(repr(os.path.abspath(b.value))) for b in written]
  before = [b.text(repr(b.value)) for b in written]
  try:
    _parse_with_gin(map(io.StringIO, absolute))
    return gin.config_str()
  finally:
    _parse_with_gin(map(io.StringIO, before))
