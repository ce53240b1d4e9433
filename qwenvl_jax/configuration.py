"""Gin configs and overrides, with errors for people.

Only this module knows gin: libraries are plain dataclasses, which config files
name by import (`from __gin__ import dynamic_registration`).
"""

import difflib
import inspect
import io
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError, did_you_mean

# The project's configs/, found wherever a command is started.
CONFIGS = Path(__file__).resolve().parents[1] / 'configs'

# Makes gin read a file through us, see `_read`.
_SCHEME = 'qwenvl-config:'

_INCLUDE = re.compile(r"""^(\s*include\s+)(['"])(.+?)\2""", re.MULTILINE)

_IMPORT = re.compile(
  r'^from\s+([\w.]+)\s+import\s+(\w+)(?:\s+as\s+(\w+))?', re.MULTILINE
)

# Since the last `load`: gin's configuration is global, and so is this.
_FILES_READ: list[Path] = []


def load(files: Iterable[str], bindings: Sequence[str] = ()) -> None:
  """Replaces gin's configuration by these files and overrides.

  Args:
    files: names of config files, found by `find_config`.
    bindings: 'NAME=VALUE' each, applied last.

  Raises:
    ConfigError: a file, name, parameter or value that does not exist, with
      what is close to it.
  """
  _install_reader()
  gin.config._IMPORTS.clear()
  _FILES_READ.clear()
  with gin.unlock_config():
    gin.clear_config()
    for file in files:
      path = find_config(file)
      with _explained(str(path)):
        gin.parse_config_file(_SCHEME + str(path))
    for binding in bindings:
      _override(binding)
    _check_macros()


def find_config(name: str, including: Path | None = None) -> Path:
  """The path of a config file.

  Args:
    name: as written on the command line or in an `include`; also `gs://..`,
      as a run keeps it.
    including: the file that includes it.

  Raises:
    ConfigError: there is none; says which are close.
  """
  if buckets.in_bucket(name):
    return buckets.as_path(name)
  places = [Path.cwd(), CONFIGS, CONFIGS.parent]
  if including is not None:
    places.insert(0, including.parent)
  for place in places:
    path = (place / name).resolve()
    # A file that includes its own name means the one it specializes.
    if path.is_file() and path != including:
      return path
  available = {
    str(path.relative_to(place))
    for place, pattern in ((CONFIGS, '**/*.gin'), (Path.cwd(), '*.gin'))
    for path in place.glob(pattern)
  }
  where = f', included by {including}' if including else ''
  raise ConfigError(
    f'config file {name!r}{where} does not exist'
    + did_you_mean(name.removeprefix('configs/'), available)
    + f'; looked in {", ".join(str(p) for p in dict.fromkeys(places))}'
  )


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
  name = target.__name__
  try:
    configured = gin.get_configurable(target)
  except (ValueError, KeyError) as error:
    raise ConfigError(
      f'the configuration says nothing about {name}: pass a --gin_file that '
      f'does, e.g. one of {_stage_files()}'
    ) from error
  if whole:
    _check_open()
  try:
    return configured()
  except QwenVLError as error:
    # Gin adds, on a line of its own, where in the configuration it was called.
    text, added, _ = str(error).partition('\n  In call to configurable')
    if not added:
      raise
    kind = DataError if isinstance(error, DataError) else ConfigError
    raise kind(text) from error
  except (TypeError, ValueError, RuntimeError) as error:
    text = str(error)
    if 'No values supplied' in text or 'equired binding' in text:
      raise ConfigError(
        f'a value is missing in the configuration: {text}'
      ) from (error)
    if 'gin.REQUIRED' in text:
      raise ConfigError(text) from error
    raise


def resolved() -> str:
  """The whole configuration as one config file, wherever it is read from.

  Relative paths become absolute. A parameter takes a path if its annotation
  says `os.PathLike`.
  """
  written = list(_written_paths())
  before = [bound[key] for bound, key in written]
  try:
    for bound, key in written:
      bound[key] = os.path.abspath(bound[key])
    return gin.config_str()
  finally:
    for (bound, key), value in zip(written, before, strict=True):
      bound[key] = value


def _written_paths() -> Iterator[tuple[dict, str]]:
  """Where gin keeps the relative paths: (bindings, key), each once."""
  found = {}
  for (_, selector), bound in gin.config._CONFIG.items():
    if selector == 'gin.macro':
      continue
    target = gin.config._REGISTRY[selector].wrapped
    parameters = inspect.signature(target).parameters
    for name in bound:
      if name not in parameters or os.PathLike not in typing.get_args(
        parameters[name].annotation
      ):
        continue
      place = _where_written(bound, name)
      if _is_relative(place[0].get(place[1])):
        found[id(place[0]), place[1]] = place
  yield from found.values()


def _where_written(bound: dict, key: str) -> tuple[dict, str]:
  """Follows `key = %NAME` to the line that has the value."""
  while match := re.fullmatch(r'%([A-Za-z_]\w*)', repr(bound.get(key))):
    bound, key = gin.config._CONFIG.get((match[1], 'gin.macro'), {}), 'value'
  return bound, key


def _is_relative(value: Any) -> bool:
  return (
    isinstance(value, str)
    and value != ''
    and '://' not in value
    and not value.startswith('~')
    and not os.path.isabs(value)
  )


def _install_reader() -> None:
  # First in line: the readers that gin comes with complain on stderr about
  # what they cannot read.
  readers = gin.config._FILE_READERS
  if readers[0][0] is not _read:
    readers.insert(0, (_read, lambda path: path.startswith(_SCHEME)))


def _read(name: str):
  """Opens a config file with its includes resolved next to it."""
  path = buckets.as_path(name.removeprefix(_SCHEME))

  def absolute(match):
    target = _SCHEME + str(find_config(match[3], path))
    return f'{match[1]}{match[2]}{target}{match[2]}'

  try:
    with buckets.refusals_told():
      text = path.read_text()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{path} cannot be read: {error}') from error
  _FILES_READ.append(path)
  file = io.StringIO(_INCLUDE.sub(absolute, text))
  file.name = str(path)
  return file


def _override(binding: str) -> None:
  """Applies one 'NAME=VALUE' from the command line."""
  key, value = (part.strip() for part in binding.split('=', 1))
  shown = f'--gin.{key}={value}'
  *scope, name = key.rsplit('/', 1)
  if '.' not in name:
    if key not in _macros():
      raise ConfigError(
        f'{shown}: the config files define no {key}'
        + did_you_mean(key, _macros(), _parameters_named(key))
      )
  else:
    selector, parameter = name.rsplit('.', 1)
    key = '/'.join([*scope, f'{_selector(selector, shown)}.{parameter}'])
  _check_value(value, key, shown)
  imports = [
    'from {} import {} as {}'.format(*module.rsplit('.', 1), name)
    for name, module in sorted(_imports().items())
  ]
  header = '\n'.join(['from __gin__ import dynamic_registration', *imports])
  with _explained(shown):
    gin.parse_config(f'{header}\n{key} = {value}')


def _macros() -> dict[str, Any]:
  """NAME -> value of the `NAME = value` lines."""
  return {
    scope: bound.get('value')
    for (scope, selector), bound in gin.config._CONFIG.items()
    if selector == 'gin.macro'
  }


def _check_macros() -> None:
  """Finds names used but not defined.

  gin would say so too, but with the whole configuration.
  """
  macros = _macros()
  for (_, selector), bound in gin.config._CONFIG.items():
    for parameter, value in bound.items():
      for name in re.findall(r'%([A-Za-z_]\w*)(?![\w.])', repr(value)):
        if name not in macros:
          where = selector.rsplit('.', 1)[-1]
          raise ConfigError(
            f'{where}.{parameter} = {value!r}, but no {name} is defined'
            + did_you_mean(name, macros)
          )


def _check_open() -> None:
  """Finds what the files leave for the caller to say (`%gin.REQUIRED`)."""
  names = [n for n, v in _macros().items() if repr(v) == '%gin.REQUIRED']
  if names:
    raise ConfigError(
      f'the config files leave open: {", ".join(names)}; give '
      + ' '.join(f'--gin.{name}=VALUE' for name in names)
      + ' (what they mean stands beside them in the files)'
    )


def _check_value(value: str, key: str, shown: str) -> None:
  """Finds the string without quotes before gin finds a syntax error."""
  if '@' in value or '%' in value:  # A reference, which gin resolves.
    return
  try:
    gin.config.parse_value(value)
  except (SyntaxError, ValueError) as error:
    raise ConfigError(
      f'{shown}: the value is no Python literal. A string is quoted, for the '
      f'shell once more: --gin.{key}=\'"{value}"\''
    ) from error


def _selector(name: str, shown: str) -> str:
  """Completes 'OptimizerConfig' to 'optimizer.OptimizerConfig'."""
  known = _configurables()
  if name in known:
    return name
  matches = [full for full in known if full.endswith('.' + name)]
  if len(matches) == 1:
    return matches[0]
  if len({id(known[m]) for m in matches}) == 1:
    return matches[0]
  if matches:
    raise ConfigError(f'{shown}: {name} may be {" or ".join(sorted(matches))}')
  last = {full.rsplit('.', 1)[-1] for full in known}
  raise ConfigError(
    f'{shown}: there is no {name}' + did_you_mean(name, [*known, *last])
  )


def _imports() -> dict[str, str]:
  """Name -> module of the imports in all config files read since `load`.

  Read off the files: gin itself only tells once a file has been parsed.
  """
  found = {}
  for path in _FILES_READ:
    for match in _IMPORT.finditer(path.read_text()):
      package, module, alias = match.groups()
      found[alias or module] = f'{package}.{module}'
  return {k: v for k, v in found.items() if not v.startswith('__gin__')}


def _configurables() -> dict[str, Any]:
  """What overrides may name: classes and functions of imported modules."""
  found = {}
  for name, module in _imports().items():
    if module in sys.modules:
      for attribute, value in _public(sys.modules[module]).items():
        found[f'{name}.{attribute}'] = value
  return found


def _public(module) -> dict[str, Any]:
  """Classes and functions of a module, less what it imports from elsewhere."""
  return {
    name: value
    for name, value in vars(module).items()
    if not name.startswith('_')
    and callable(value)
    and getattr(value, '__module__', None) == module.__name__
  }


def _parameters_named(name: str) -> list[str]:
  """Class.parameter for parameters called nearly so."""
  found = []
  for full, value in _configurables().items():
    for parameter in difflib.get_close_matches(
      name.lower(), _parameters(value), n=1, cutoff=0.8
    ):
      found.append(f'{full.rsplit(".", 1)[-1]}.{parameter}')
  return found


def _parameters(target: Any) -> list[str]:
  try:
    return list(inspect.signature(target).parameters)
  except (TypeError, ValueError):
    return []


class _explained:
  """Turns gin's exceptions while parsing into a `ConfigError`."""

  def __init__(self, where: str):
    self._where = where

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if error is None or isinstance(error, QwenVLError):
      return False
    if not isinstance(
      error, (ImportError, NameError, AttributeError, ValueError, SyntaxError)
    ):
      return False
    text = ' '.join(str(error).split())
    text, *place = re.split(
      r'\.? (?=In file|In bindings string)', text, maxsplit=1
    )
    # Of an override, the place is a line that nobody wrote.
    place = [f' ({p[0].lower()}{p[1:]})' for p in place if 'In file' in p]
    message = f'{self._where}: {text}{_hint(text)}{"".join(place)}'
    raise ConfigError(message) from error


def _hint(text: str) -> str:
  """What is close to the name that gin did not find."""
  if match := re.search(r"'(\w+)' was not provided by an import", text):
    elsewhere = _imports().get(match[1])
    if elsewhere:
      package = elsewhere.rpartition('.')[0]
      return (
        f'; another file imports it, and each needs its own line: from '
        f'{package} import {match[1]}'
      )
    return did_you_mean(match[1], _imports())
  if match := re.search(r"resolve selector ([\w.]+); <module '([\w.]+)'", text):
    module = sys.modules[match[2]]
    return did_you_mean(match[1].rsplit('.', 1)[-1], _public(module))
  if match := re.search(
    r"'([\w.]+)' doesn't have a parameter named '(\w+)'", text
  ):
    found = _configurables().get(match[1])
    return did_you_mean(match[2], _parameters(found)) if found else ''
  if match := re.search(r"No module named '([\w.]+)\.(\w+)'", text):
    package = sys.modules.get(match[1])
    paths = getattr(package, '__path__', [])
    return did_you_mean(match[2], [m.name for m in pkgutil.iter_modules(paths)])
  return ''


def _stage_files() -> list[str]:
  return sorted(p.name for p in CONFIGS.glob('*.gin'))
