"""Reads config files and parses them; nothing of them is called.

What they may import and name is decided here.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import pkgutil
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gin import config_parser

from qwenvl_jax import buckets
from qwenvl_jax.configuration.value_types import hints
from qwenvl_jax.errors import ConfigError, did_you_mean

# The project's configs/, found wherever a command is started: in a checkout
# through a link in the package, so that wheels hold them as well.
CONFIGS = (Path(__file__).parents[1] / 'configs').resolve()

# Packages besides ours that config files may import from, with commas between:
# who starts a command trusts them, a file cannot.
PACKAGES = 'QWENVL_CONFIG_PACKAGES'

HEADER = 'from __gin__ import dynamic_registration'
REQUIRED = 'gin.REQUIRED'

# What config files of earlier versions name, and what has taken its place.
_REPLACED = {
  'qwenvl_jax.data.bad': 'qwenvl_jax.data.record_errors, and its Limit '
  'ErrorBudget',
  'qwenvl_jax.data.packed': 'qwenvl_jax.data.packing',
  'qwenvl_jax.data.tasks.AskedTasks': 'qwenvl_jax.data.formats.Answers '
  '(branches = 6 is what AskedTasks had)',
}

# No config file comes near this.
_MAX_BYTES = 2**20


signature = functools.cache(inspect.signature)


@dataclasses.dataclass(frozen=True)
class Reference:
  """`@scope/module.Name`, with `()` where it is called."""

  name: str
  called: bool

  def __repr__(self):
    return f'@{self.name}' + '()' * self.called


@dataclasses.dataclass(frozen=True)
class Macro:
  """`%NAME`."""

  name: str

  def __repr__(self):
    return f'%{self.name}'


class _Delegate(config_parser.ParserDelegate):
  configurable_reference = staticmethod(Reference)
  macro = staticmethod(Macro)


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
    try:
      path = (place / name).resolve()
      # A file that includes its own name means the one it specializes.
      if path.exists() and not path.is_dir() and path != including:
        return path
    except (OSError, ValueError, RuntimeError):
      continue  # No name for a file: too long, or with a NUL.
  available = {
    str(path.relative_to(place))
    for place, pattern in ((CONFIGS, '**/*.gin'), (Path.cwd(), '*.gin'))
    for path in place.glob(pattern)
  }
  where = f', included by {including}' if including else ''
  raise ConfigError(
    f'config file {name[:200]!r}{where} does not exist'
    + did_you_mean(name[:200].removeprefix('configs/'), available)
    + f'; looked in {", ".join(str(p) for p in dict.fromkeys(places))}'
  )


def read_text(path: Path) -> str:
  """Returns the text of a config file, its lines ended by line feeds alone.

  Raises:
    ConfigError: it is no regular file, too large, not UTF-8, or cannot be read.
  """
  try:
    with buckets.refusals_told():
      if not buckets.in_bucket(path) and not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(f'{path} is no regular file')
      if buckets.size(path) > _MAX_BYTES:
        raise ConfigError(f'{path} is too large for a config file')
      text = path.read_bytes().decode('utf-8-sig')
      return text.replace('\r\n', '\n')
  except (OSError, ValueError) as error:
    raise ConfigError(f'{path} cannot be read: {error}') from error


def parse(text: str, where: str) -> list:
  """Returns the statements of a config text; imports and calls nothing.

  Raises:
    ConfigError: the text is no config; names the line.
  """
  try:
    return list(config_parser.ConfigParser(text, _Delegate()))
  except Exception as error:  # Whatever its tokenizer stumbles over.
    line = getattr(error, 'lineno', None) or getattr(error, 'line_num', None)
    place = f' line {line}' if line else ''
    text = getattr(error, 'msg', None) or one_line(error)
    raise ConfigError(
      f'{where}{place}: {" ".join(str(text).split())}'
    ) from error


def one_line(error: Exception) -> str:
  """Returns what an error of gin says, in a line of at most 500 characters."""
  # Gin adds, on a line of its own, in which call it happened.
  text, _, call = str(error).partition('\n  In call to configurable ')
  name = call.split(' ')[0].strip("'")
  text = ' '.join(text.split()) or type(error).__name__
  return (f'{name}: {text}' if name else text)[:500]


def leaves(value: Any) -> Iterator[Any]:
  """What a value is made of, without its lists, tuples and dicts."""
  if isinstance(value, dict):
    for item in value.items():
      yield from leaves(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from leaves(item)
  else:
    yield value


def packages() -> list[str]:
  """Returns the packages that config files may import from."""
  more = os.environ.get(PACKAGES, '').split(',')
  return ['qwenvl_jax', *filter(None, more)]


def instead_of(path: str, name: str, known: Iterable[str]) -> str:
  """The end of a message about a name that a module does not have.

  Args:
    path: of the module.
    name: as the config file has it.
    known: names that the module has.

  Returns:
    What has replaced it since an earlier version, or what may have been meant.
  """
  new = _REPLACED.get(f'{path}.{name}')
  return (
    f'; since an earlier version it is {new}'
    if new
    else did_you_mean(name, known)
  )


def check_import(statement: config_parser.ImportStatement, where: str) -> None:
  """Imports a module that config files may name.

  Raises:
    ConfigError: it is of another package, or cannot be imported.
  """
  where = f'{where} line {statement.location.line_num}'
  # The second is in what gin writes where a value is %gin.REQUIRED.
  if statement.module in ('__gin__.dynamic_registration', 'gin.config'):
    return
  package, _, name = statement.module.rpartition('.')
  if statement.module.partition('.')[0] not in packages():
    raise ConfigError(
      f'{where}: config files import only from {" and ".join(packages())}, '
      f'not {statement.module} (who trusts a package says so in {PACKAGES})'
    )
  try:
    importlib.import_module(statement.module)
  except ImportError as error:
    paths = getattr(sys.modules.get(package), '__path__', [])
    near = [module.name for module in pkgutil.iter_modules(paths)]
    hint = instead_of(package, name, near)
    raise ConfigError(f'{where}: {error}{hint}') from error


def public(module: Any) -> dict[str, Any]:
  """Classes and functions of a module.

  What it imports from elsewhere counts if the module lists it in `__all__`.
  """
  if not isinstance(module, ModuleType):
    return {}
  listed = getattr(module, '__all__', ())
  return {
    name: value
    for name, value in vars(module).items()
    if not name.startswith('_')
    and (name in listed or getattr(value, '__module__', '') == module.__name__)
    and may_be_called(value)
  }


def may_be_called(value: Any) -> bool:
  """Whether a config may name this: what makes objects, and does no more."""
  module = str(getattr(value, '__module__', ''))
  if module.partition('.')[0] not in packages():
    return False
  if inspect.isclass(value):
    return not issubclass(value, BaseException)
  made = hints(value).get('return') if inspect.isfunction(value) else None
  return made not in (None, type(None))
