"""What config files and overrides say, checked before gin takes it.

A config file travels with its run, and gin would import and call whatever it
names. So a file is parsed twice: here, where names, values and types are
checked and nothing is called, and then by gin.
"""

import dataclasses
import inspect
import io
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from gin import config_parser

from qwenvl_jax.configuration.parsing import (
  HEADER,
  REQUIRED,
  Macro,
  Reference,
  check_import,
  find_config,
  instead_of,
  leaves,
  may_be_called,
  packages,
  parse,
  public,
  read_text,
  signature,
)
from qwenvl_jax.configuration.value_types import Made, describe, fits, hints
from qwenvl_jax.errors import ConfigError, did_you_mean

# No configuration comes near these; one made to use up memory does.
_MAX_FILES = 100
_MAX_DEPTH = 20
_MAX_VALUES = 20_000
_MAX_BITS = 4096


@dataclasses.dataclass(frozen=True)
class Binding:
  """One `NAME = value`, or `scope/module.Name.parameter = value`.

  Attributes:
    key: as it is written.
    value: literals, `Reference`s and `Macro`s.
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

  def text(self, value: str) -> str:
    """A config file of its own that binds a value."""
    imports = (x.format() for x in self.imports.values())
    lines = [HEADER, *(x for x in imports if x != HEADER)]
    return '\n'.join([*lines, f'{self.key} = {value}\n'])


class Configuration:
  """What some files and overrides say.

  Attributes:
    macros: NAME -> binding.
    bound: (scope, class or function) -> {parameter: binding}.
    named: the classes and functions that are mentioned.
    texts: what gin is to parse, in this order.
  """

  def __init__(self):
    self.macros: dict[str, Binding] = {}
    self.bound: dict[tuple[str, Any], dict[str, Binding]] = {}
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
    text = read_text(path)
    statements = parse(text, str(path))
    # As the parser has them: other characters that end lines do not count.
    lines = io.StringIO(text).readlines()
    starts = [x.location.line_num - 1 for x in statements] + [len(lines)]
    # gin gets the file in pieces, an included file between two of them. Other
    # lines stay empty, so that lines keep their numbers.
    imports, kept = {}, set()
    for statement, start, end in zip(statements, starts, starts[1:]):
      if isinstance(statement, config_parser.ImportStatement):
        check_import(statement, str(path))
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

  def _add(self, statement, imports, where: str) -> Binding | None:
    """Notes a binding; checks that what it names exists."""
    scope, selector = statement.scope, statement.selector
    if isinstance(statement, config_parser.BlockDeclaration):
      self.named.append(self._resolve(selector, imports, where))
      return None
    for value in leaves(statement.value):
      if isinstance(value, Reference):
        name = value.name.rpartition('/')[2]
        self.named.append(self._resolve(name, imports, where))
    key = f'{scope}/{selector}' if scope else selector
    if not statement.arg_name:
      binding = Binding(key, statement.value, where, imports)
      self.macros[key] = binding
      return binding
    target = self._resolve(selector, imports, where)
    known = signature(target).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if statement.arg_name not in known and not any_name:
      raise ConfigError(
        f"{where}: {selector} has no parameter named '{statement.arg_name}'"
        + did_you_mean(statement.arg_name, known)
      )
    key = f'{key}.{statement.arg_name}'
    binding = Binding(
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
      raise ConfigError(f'{where}: the file lacks the line {HEADER}')
    statement = imports[first]
    plain = not statement.is_from and not statement.alias
    found = sys.modules[first if plain else statement.module]
    for name in rest:
      if not isinstance(found, ModuleType) or not hasattr(found, name):
        path = getattr(found, '__name__', '')
        hint = instead_of(path, name, public(found))
        raise ConfigError(f'{where}: there is no {selector}{hint}')
      found = getattr(found, name)
    if not may_be_called(found):
      raise ConfigError(
        f'{where}: {selector} is not for config files, which make objects of '
        f'{" and ".join(packages())}'
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
      statements = parse(f'{key} = {value}', shown)
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
    self.texts.append(io.StringIO(binding.text(value)))
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
      if statement.module.partition('.')[0] in packages()
      for attribute, value in public(sys.modules[statement.module]).items()
    }

  def _parameters_named(self, name: str) -> list[str]:
    """Class.parameter for parameters called so, but for their case."""
    return [
      f'{full.rsplit(".", 1)[-1]}.{parameter}'
      for full, value in self._configurables().items()
      for parameter in signature(value).parameters
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
        if not isinstance(value, Macro) and not fits(value, hint):
          written = binding.value
          shown = written if value == written else f'{written!r} = {value!r}'
          quoted = '; numbers stand without quotes' * isinstance(value, str)
          raise ConfigError(
            f'{binding.where}: {binding.target.__name__}.{binding.parameter} = '
            f'{str(shown) if shown is not written else repr(shown)[:200]}: '
            f'wanted is {describe(hint)}'
            + (quoted if fits(0, hint) and not fits('', hint) else '')
          )

  def _expand(self, binding: Binding) -> Any:
    """A value with macros replaced, and references by what they make."""
    count = 0

    def expand(value, binding, seen):
      nonlocal count
      count += 1
      if count > _MAX_VALUES:
        raise ConfigError(f'{binding.where}: more than {_MAX_VALUES} values')
      if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ConfigError(
          f'{binding.where}: {binding.key} is a number of '
          f'{value.bit_length():,} bits'
        )
      if isinstance(value, Macro) and value.name != REQUIRED:
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
      if isinstance(value, Reference):
        name = value.name.rpartition('/')[2]
        target = self._resolve(name, binding.imports, binding.where)
        if not value.called:
          return Made(type if inspect.isclass(target) else type(target))
        if inspect.isclass(target):
          return Made(target)
        return Made(hints(target).get('return', Any))
      if isinstance(value, dict):
        return {
          expand(k, binding, seen) if isinstance(k, Macro) else k: expand(
            v, binding, seen
          )
          for k, v in value.items()
        }
      if isinstance(value, list | tuple):
        return type(value)(expand(v, binding, seen) for v in value)
      return value

    return expand(binding.value, binding, set())

  def left_open(self) -> list[str]:
    """The macros that the files leave for the caller to say."""
    required = Macro(REQUIRED)
    return [name for name, x in self.macros.items() if x.value == required]

  def relative_paths(self) -> Iterator[Binding]:
    """The bindings, or macros, that hold relative paths.

    A parameter takes a path if its annotation says `os.PathLike`.
    """
    found = {}
    for bound in self.bound.values():
      for binding in bound.values():
        hint = hints(binding.target).get(binding.parameter)
        if os.PathLike not in typing.get_args(hint):
          continue
        while isinstance(binding.value, Macro):
          if binding.value.name == REQUIRED:
            break
          binding = self.macros[binding.value.name]
        if _is_relative(binding.value):
          found[binding.key] = binding
    yield from found.values()


def _is_relative(value: Any) -> bool:
  return (
    isinstance(value, str)
    and value != ''
    and '://' not in value
    and not value.startswith('~')
    and not os.path.isabs(value)
  )
