"""Gin configs and overrides, with errors for people.

Only this module knows gin: libraries are plain dataclasses, which config files
name by import (`from __gin__ import dynamic_registration`).

A config file travels with its run, and gin would import and call whatever it
names. So a file is parsed twice: here, where names, values and types are
checked and nothing is called, and then by gin.
"""

import dataclasses
import functools
import importlib
import inspect
import io
import os
import pkgutil
import stat
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gin
from gin import config_parser

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError, did_you_mean
from qwenvl_jax.value_types import Made, describe, fits, hints

# The project's configs/, found wherever a command is started.
CONFIGS = Path(__file__).resolve().parents[1] / 'configs'

# Packages besides ours that config files may import from, with commas between:
# who starts a command trusts them, a file cannot.
PACKAGES = 'QWENVL_CONFIG_PACKAGES'

_HEADER = 'from __gin__ import dynamic_registration'
_REQUIRED = 'gin.REQUIRED'

# No configuration comes near these; one made to use up memory does.
_MAX_BYTES = 2**20
_MAX_FILES = 100
_MAX_DEPTH = 20
_MAX_VALUES = 20_000


_signature = functools.cache(inspect.signature)


@dataclasses.dataclass(frozen=True)
class _Reference:
  """`@scope/module.Name`, with `()` where it is called."""

  name: str
  called: bool

  def __repr__(self):
    return f'@{self.name}' + '()' * self.called


@dataclasses.dataclass(frozen=True)
class _Macro:
  """`%NAME`."""

  name: str

  def __repr__(self):
    return f'%{self.name}'


class _Delegate(config_parser.ParserDelegate):
  configurable_reference = staticmethod(_Reference)
  macro = staticmethod(_Macro)


@dataclasses.dataclass(frozen=True)
class _Binding:
  """One `NAME = value`, or `scope/module.Name.parameter = value`.

  Attributes:
    key: as it is written.
    value: literals, `_Reference`s and `_Macro`s.
    where: file and line.
    imports: name -> import of the file.
    scope: of the parameter.
    target: the class or function; None for a macro.
    parameter: of the target.
  """

  key: str
  value: Any
  where: str
  imports: dict[str, config_parser.ImportStatement]
  scope: str = ''
  target: Any = None
  parameter: str = ''


class _Configuration:
  """What some files and overrides say.

  Attributes:
    macros: NAME -> binding.
    bound: (scope, class or function) -> {parameter: binding}.
    named: the classes and functions that are mentioned.
    texts: what gin is to parse, in this order.
  """

  def __init__(self):
    self.macros: dict[str, _Binding] = {}
    self.bound: dict[tuple[str, Any], dict[str, _Binding]] = {}
    self.named: list[Any] = []
    self.texts: list[io.StringIO] = []
    self._imports: dict[str, config_parser.ImportStatement] = {}
    self._files = 0

  def read(self, path: Path, including: tuple[Path, ...] = ()) -> None:
    """Reads a file and what it includes."""
    self._files += 1
    if path in including:
      chain = ' includes '.join(map(str, (*including, path)))
      raise ConfigError(f'config files include each other: {chain}')
    if len(including) > _MAX_DEPTH or self._files > _MAX_FILES:
      raise ConfigError(
        f'{path}: more than {_MAX_FILES} config files, or files that include '
        f'each other more than {_MAX_DEPTH} deep'
      )
    text = _read(path)
    statements = _parse(text, str(path))
    lines = text.splitlines(keepends=True)
    starts = [x.location.line_num - 1 for x in statements] + [len(lines)]
    # gin gets the file in pieces, an included file between two of them. Other
    # lines stay empty, so that lines keep their numbers.
    imports, kept = {}, set()
    for statement, start, end in zip(statements, starts, starts[1:]):
      if isinstance(statement, config_parser.ImportStatement):
        _check_import(statement, str(path))
        imports[statement.bound_name()] = statement
        kept |= set(range(start, end))
    self._imports |= imports
    begin = 0

    def pass_on(begin: int, end: int) -> None:
      chosen = [
        line if begin <= i < end or i in kept else '\n'
        for i, line in enumerate(lines)
      ]
      self.texts.append(io.StringIO(''.join(chosen)))
      self.texts[-1].name = str(path)

    for statement, start, end in zip(statements, starts, starts[1:]):
      if isinstance(statement, config_parser.IncludeStatement):
        pass_on(begin, start)
        begin = end
        self.read(find_config(statement.filename, path), (*including, path))
      elif not isinstance(statement, config_parser.ImportStatement):
        self._add(statement, imports, f'{path} line {start + 1}')
    pass_on(begin, len(lines))

  def _add(self, statement, imports, where: str) -> _Binding | None:
    """Notes a binding; checks that what it names exists."""
    scope, selector = statement.scope, statement.selector
    if isinstance(statement, config_parser.BlockDeclaration):
      self.named.append(self._resolve(selector, imports, where))
      return None
    for value in _leaves(statement.value):
      if isinstance(value, _Reference):
        name = value.name.rpartition('/')[2]
        self.named.append(self._resolve(name, imports, where))
    key = f'{scope}/{selector}' if scope else selector
    if not statement.arg_name:
      binding = _Binding(key, statement.value, where, imports)
      self.macros[key] = binding
      return binding
    target = self._resolve(selector, imports, where)
    known = _signature(target).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if statement.arg_name not in known and not any_name:
      raise ConfigError(
        f"{where}: {selector} has no parameter named '{statement.arg_name}'"
        + did_you_mean(statement.arg_name, known)
      )
    key = f'{key}.{statement.arg_name}'
    binding = _Binding(
      key, statement.value, where, imports, scope, target, statement.arg_name
    )
    self.bound.setdefault((scope, target), {})[binding.parameter] = binding
    self.named.append(target)
    return binding

  def _resolve(self, selector: str, imports, where: str) -> Any:
    """The class or function that a name means in a file."""
    first, *rest = selector.split('.')
    if first not in imports:
      if first in self._imports:
        hint = (
          '; another file imports it, and each needs its own line: '
          + self._imports[first].format()
        )
      else:
        hint = did_you_mean(first, imports)
      raise ConfigError(f"{where}: '{first}' was not imported{hint}")
    if '__gin__' not in ''.join(x.module for x in imports.values()):
      raise ConfigError(f'{where}: the file lacks the line {_HEADER}')
    statement = imports[first]
    plain = not statement.is_from and not statement.alias
    found = sys.modules[first if plain else statement.module]
    for name in rest:
      if not isinstance(found, ModuleType) or not hasattr(found, name):
        raise ConfigError(
          f'{where}: there is no {selector}'
          + did_you_mean(name, _public(found))
        )
      found = getattr(found, name)
    if not _may_be_called(found):
      raise ConfigError(
        f'{where}: {selector} is not for config files, which make objects of '
        f'{" and ".join(_packages())}'
      )
    return found

  def override(self, text: str) -> None:
    """Applies one 'NAME=VALUE' from the command line."""
    key, _, value = (part.strip() for part in text.partition('='))
    brief = ' '.join(value.split())[:200]
    shown = f'--gin.{key}={brief}'
    *scope, name = key.rsplit('/', 1)
    if '.' not in name:
      if key not in self.macros:
        raise ConfigError(
          f'{shown}: the config files define no {key}'
          + did_you_mean(key, self.macros, self._parameters_named(key))
        )
    else:
      selector, parameter = name.rsplit('.', 1)
      key = '/'.join([*scope, f'{self._complete(selector, shown)}.{parameter}'])
    try:
      statements = _parse(f'{key} = {value}', shown)
    except ConfigError as error:
      if '@' in value or '%' in value:
        raise
      raise ConfigError(
        f'{shown}: the value is no Python literal. A string is quoted, for the '
        f'shell once more: --gin.{key}=\'"{brief}"\''
      ) from error
    if len(statements) != 1 or not isinstance(
      statements[0], config_parser.BindingStatement
    ):
      raise ConfigError(f'{shown}: more than one value')
    binding = self._add(statements[0], self._imports, shown)
    self.texts.append(io.StringIO(_assignment(binding, value)))
    self.texts[-1].name = shown

  def _complete(self, name: str, shown: str) -> str:
    """Completes 'OptimizerConfig' to 'optimizer.OptimizerConfig'."""
    known = self._configurables()
    matches = [x for x in known if x == name or x.endswith('.' + name)]
    if name in known or len({id(known[x]) for x in matches}) == 1:
      return name if name in known else matches[0]
    if matches:
      raise ConfigError(
        f'{shown}: {name} may be {" or ".join(sorted(matches))}'
      )
    last = {full.rsplit('.', 1)[-1] for full in known}
    raise ConfigError(
      f'{shown}: there is no {name}' + did_you_mean(name, [*known, *last])
    )

  def _configurables(self) -> dict[str, Any]:
    """What overrides may name: all that the imported modules define."""
    return {
      f'{name}.{attribute}': value
      for name, statement in self._imports.items()
      if statement.module.partition('.')[0] in _packages()
      for attribute, value in _public(sys.modules[statement.module]).items()
    }

  def _parameters_named(self, name: str) -> list[str]:
    """Class.parameter for parameters called so, but for their case."""
    return [
      f'{full.rsplit(".", 1)[-1]}.{parameter}'
      for full, value in self._configurables().items()
      for parameter in _signature(value).parameters
      if parameter.lower() == name.lower()
    ]

  def check(self) -> None:
    """Finds names that are not defined and values of another type."""
    for binding in self.macros.values():
      self._expand(binding)
    for bound in self.bound.values():
      for binding in bound.values():
        value = self._expand(binding)
        hint = hints(binding.target).get(binding.parameter, Any)
        if not isinstance(value, _Macro) and not fits(value, hint):
          written = binding.value
          shown = written if value == written else f'{written!r} = {value!r}'
          quoted = '; numbers stand without quotes' * isinstance(value, str)
          raise ConfigError(
            f'{binding.where}: {binding.target.__name__}.{binding.parameter} = '
            f'{str(shown) if shown is not written else repr(shown)[:200]}: '
            f'wanted is {describe(hint)}'
            + (quoted if fits(0, hint) and not fits('', hint) else '')
          )

  def _expand(self, binding: _Binding) -> Any:
    """A value with macros replaced, and references by what they make."""
    count = 0

    def expand(value, binding, seen):
      nonlocal count
      count += 1
      if count > _MAX_VALUES:
        raise ConfigError(f'{binding.where}: more than {_MAX_VALUES} values')
      if isinstance(value, _Macro) and value.name != _REQUIRED:
        if value.name in seen:
          raise ConfigError(
            f'{binding.where}: {binding.key} = {value!r} leads back to itself'
          )
        if value.name not in self.macros:
          raise ConfigError(
            f'{binding.where}: {binding.key} = {value!r}, but no {value.name} '
            'is defined' + did_you_mean(value.name, self.macros)
          )
        inner = self.macros[value.name]
        return expand(inner.value, inner, {*seen, value.name})
      if isinstance(value, _Reference):
        name = value.name.rpartition('/')[2]
        target = self._resolve(name, binding.imports, binding.where)
        if not value.called:
          return Made(type if inspect.isclass(target) else type(target))
        if inspect.isclass(target):
          return Made(target)
        return Made(hints(target).get('return', Any))
      if isinstance(value, dict):
        return {
          expand(k, binding, seen) if isinstance(k, _Macro) else k: expand(
            v, binding, seen
          )
          for k, v in value.items()
        }
      if isinstance(value, list | tuple):
        return type(value)(expand(v, binding, seen) for v in value)
      return value

    return expand(binding.value, binding, set())

  def check_complete(self, target: Any) -> None:
    """Follows what will be called from a target on.

    Raises:
      ConfigError: a value is missing, or something leads back to itself.
    """
    count = 0

    def follow(target, scopes, stack):
      nonlocal count
      count += 1
      if count > _MAX_VALUES:
        raise ConfigError('the configuration makes more than 20,000 objects')
      if (target, scopes) in stack:
        raise ConfigError(f'{target.__name__} is made from itself')
      found = {}
      for i in range(len(scopes) + 1):
        found |= self.bound.get(('/'.join(scopes[:i]), target), {})
      parameters = _signature(target).parameters.values()
      missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in found
      ]
      if missing:
        raise ConfigError(
          'a value is missing in the configuration: nothing is bound to '
          + ', '.join(f"'{name}'" for name in missing)
          + f' of {target.__name__}'
        )
      for binding in found.values():
        visit(binding.value, binding, scopes, {*stack, (target, scopes)})

    def visit(value, binding, scopes, stack):
      for leaf in _leaves(value):
        if isinstance(leaf, _Macro) and leaf.name in self.macros:
          inner = self.macros[leaf.name]
          visit(inner.value, inner, scopes, stack)
        elif isinstance(leaf, _Macro):
          raise ConfigError(_left_open([binding.key]))
        elif isinstance(leaf, _Reference) and leaf.called:
          *more, name = leaf.name.split('/')
          made = self._resolve(name, binding.imports, binding.where)
          follow(made, (*scopes, *more), stack)

    follow(target, (), frozenset())

  def relative_paths(self) -> Iterator[_Binding]:
    """The bindings, or macros, that hold relative paths.

    A parameter takes a path if its annotation says `os.PathLike`.
    """
    found = {}
    for bound in self.bound.values():
      for binding in bound.values():
        hint = hints(binding.target).get(binding.parameter)
        if os.PathLike not in typing.get_args(hint):
          continue
        while isinstance(binding.value, _Macro):
          if binding.value.name == _REQUIRED:
            break
          binding = self.macros[binding.value.name]
        if _is_relative(binding.value):
          found[binding.key] = binding
    yield from found.values()


_loaded = _Configuration()


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
  found = _Configuration()
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
        raise ConfigError(f'{text.name}: {_line(error)}') from error


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
  if whole:
    names = [
      name
      for name, binding in _loaded.macros.items()
      if binding.value == _Macro(_REQUIRED)
    ]
    if names:
      raise ConfigError(_left_open(names))
  _loaded.check_complete(target)
  try:
    return gin.get_configurable(target)()
  except QwenVLError as error:
    # Gin adds, on a line of its own, where in the configuration it was called.
    text, added, _ = str(error).partition('\n  In call to configurable')
    if not added:
      raise
    kind = DataError if isinstance(error, DataError) else ConfigError
    raise kind(text) from error
  except (TypeError, ValueError, ArithmeticError) as error:
    # Values of which the classes themselves say that they do not fit.
    raise ConfigError(f'the configuration: {_line(error)}') from error


def _left_open(names: list[str]) -> str:
  return (
    f'the config files leave open: {", ".join(names)}; give '
    + ' '.join(f'--gin.{name}=VALUE' for name in names)
    + ' (what they mean stands beside them in the files)'
  )


def resolved() -> str:
  """The whole configuration as one config file, wherever it is read from.

  Relative paths become absolute.
  """
  written = list(_loaded.relative_paths())
  absolute = [_assignment(b, repr(os.path.abspath(b.value))) for b in written]
  before = [_assignment(b, repr(b.value)) for b in written]
  try:
    _parse_with_gin(map(io.StringIO, absolute))
    return gin.config_str()
  finally:
    _parse_with_gin(map(io.StringIO, before))


def _assignment(binding: _Binding, value: str) -> str:
  """A config text of one binding."""
  imports = (x.format() for x in binding.imports.values())
  lines = [_HEADER, *(x for x in imports if x != _HEADER)]
  return '\n'.join([*lines, f'{binding.key} = {value}\n'])


def _is_relative(value: Any) -> bool:
  return (
    isinstance(value, str)
    and value != ''
    and '://' not in value
    and not value.startswith('~')
    and not os.path.isabs(value)
  )


def _read(path: Path) -> str:
  try:
    with buckets.refusals_told():
      if not buckets.in_bucket(path) and not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(f'{path} is no regular file')
      if buckets.size(path) > _MAX_BYTES:
        raise ConfigError(f'{path} is too large for a config file')
      return path.read_bytes().decode()
  except (OSError, ValueError) as error:
    raise ConfigError(f'{path} cannot be read: {error}') from error


def _parse(text: str, where: str) -> list:
  """The statements of a config text; nothing is imported or called."""
  try:
    return list(config_parser.ConfigParser(text, _Delegate()))
  except Exception as error:  # Whatever its tokenizer stumbles over.
    line = getattr(error, 'lineno', None) or getattr(error, 'line_num', None)
    place = f' line {line}' if line else ''
    text = getattr(error, 'msg', None) or _line(error)
    raise ConfigError(
      f'{where}{place}: {" ".join(str(text).split())}'
    ) from error


def _line(error: Exception) -> str:
  # Gin adds, on a line of its own, in which call it happened.
  text, _, call = str(error).partition('\n  In call to configurable ')
  name = call.split(' ')[0].strip("'")
  text = ' '.join(text.split()) or type(error).__name__
  return (f'{name}: {text}' if name else text)[:500]


def _leaves(value: Any) -> Iterator[Any]:
  """What a value is made of, without its lists, tuples and dicts."""
  if isinstance(value, dict):
    for item in value.items():
      yield from _leaves(item)
  elif isinstance(value, list | tuple):
    for item in value:
      yield from _leaves(item)
  else:
    yield value


def _packages() -> list[str]:
  more = os.environ.get(PACKAGES, '').split(',')
  return ['qwenvl_jax', *filter(None, more)]


def _check_import(statement: config_parser.ImportStatement, where: str) -> None:
  """Imports a module that config files may name."""
  where = f'{where} line {statement.location.line_num}'
  # The second is in what gin writes where a value is %gin.REQUIRED.
  if statement.module in ('__gin__.dynamic_registration', 'gin.config'):
    return
  package, _, name = statement.module.rpartition('.')
  if statement.module.partition('.')[0] not in _packages():
    raise ConfigError(
      f'{where}: config files import only from {" and ".join(_packages())}, '
      f'not {statement.module} (who trusts a package says so in {PACKAGES})'
    )
  try:
    importlib.import_module(statement.module)
  except ImportError as error:
    paths = getattr(sys.modules.get(package), '__path__', [])
    near = [module.name for module in pkgutil.iter_modules(paths)]
    raise ConfigError(f'{where}: {error}' + did_you_mean(name, near)) from error


def _public(module: Any) -> dict[str, Any]:
  """Classes and functions of a module, less what it imports from elsewhere."""
  return (
    {
      name: value
      for name, value in vars(module).items()
      if not name.startswith('_')
      and getattr(value, '__module__', None) == module.__name__
      and _may_be_called(value)
    }
    if isinstance(module, ModuleType)
    else {}
  )


def _may_be_called(value: Any) -> bool:
  """Whether a config may name this: what makes objects, and does no more."""
  module = str(getattr(value, '__module__', ''))
  if module.partition('.')[0] not in _packages():
    return False
  if inspect.isclass(value):
    return not issubclass(value, BaseException)
  made = hints(value).get('return') if inspect.isfunction(value) else None
  return made not in (None, type(None))
