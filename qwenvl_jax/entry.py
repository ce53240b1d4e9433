"""The command line that all console commands share.

A command that runs a configured job takes `--gin_file=FILE` (repeatable) and
`--gin.NAME=VALUE`, which `configuration.load` understands.
"""

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import inspect
import logging
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.file_proxy import FileProxy

from qwenvl_jax.errors import (
  ConfigError,
  QwenVLError,
  did_you_mean,
  printable,
)

# JAX's variable: where compiled programs are kept, '' for nowhere.
COMPILED = 'JAX_COMPILATION_CACHE_DIR'

# Programs that compile faster than this are not kept; those used longest ago
# make room.
_WORTH_KEEPING_SECONDS = 0.2
_KEPT_BYTES = 8 * 2**30

# What a disk may say, which is no fault of the program.
_DISK = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES),
  *(errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.EMFILE, errno.ELOOP),
  # A file where a folder belongs, or a folder where a file does.
  *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR),
)

GIN_HELP = """\
configuration:
  --gin_file=FILE      a config file; may be repeated, later ones win. Looked
                       for in the current folder, next to the file that includes
                       it, and in the project's configs/.
  --gin.NAME=VALUE     overrides one value: a name defined in the files
                       (--gin.STEPS=100) or a parameter of a class or function
                       (--gin.OptimizerConfig.peak=1e-4). Strings are quoted:
                       --gin.DATA='"scenes"'
"""


def parser(prog: str, description: str, examples: str = '', gin_help=True):
  """An argument parser in the manner of all commands.

  Args:
    gin_help: whether the command takes `--gin_file` and `--gin.NAME=VALUE`.

  Returns:
    An `argparse.ArgumentParser`.
  """
  epilog = GIN_HELP if gin_help else ''
  if examples:
    epilog += '\nexamples:\n' + inspect.cleandoc(examples).replace(
      '\n', '\n  '
    ).join(['  ', '\n'])
  result = argparse.ArgumentParser(
    prog=prog,
    description=inspect.cleandoc(description),
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  if gin_help:
    result.add_argument(
      '--gin_file', action='append', default=[], help=argparse.SUPPRESS
    )
  return result


def parse(
  arguments: argparse.ArgumentParser, argv: Sequence[str], config: str = ''
) -> tuple[argparse.Namespace, list[str]]:
  """Parses a command line into flags and gin bindings.

  Args:
    config: name of a config file, for a command that needs one.

  Returns:
    (flags, bindings such as 'STEPS=100').

  Raises:
    ConfigError: an unknown argument, a binding without a value, or no config
      file where one is needed.
  """
  plain, bindings = [], []
  rest = iter(argv)
  for argument in rest:
    if not argument.startswith('--gin.'):
      plain.append(argument)
      continue
    binding = argument.removeprefix('--gin.')
    if '=' not in binding:
      value = next(rest, None)
      if value is None:
        raise ConfigError(f'{argument} has no value: write {argument}=VALUE')
      binding = f'{binding}={value}'
    bindings.append(binding)
  flags, unknown = arguments.parse_known_args(plain)
  if unknown:
    known = [
      option
      for action in arguments._actions
      for option in action.option_strings
    ]
    raise ConfigError(
      f'unknown argument {unknown[0]}'
      + did_you_mean(unknown[0].split('=')[0], known)
      + f'; see {arguments.prog} --help'
    )
  if config and not flags.gin_file:
    raise ConfigError(
      f'no --gin_file given: name a config file, e.g. --gin_file={config}'
    )
  return flags, bindings


def add_fields(
  arguments: argparse.ArgumentParser,
  kind: type,
  helps: Mapping[str, tuple[str, str]],
) -> None:
  """Adds an option for fields of a dataclass, of their type and default.

  Args:
    arguments: from `parser`.
    kind: the dataclass; fields without a default, or with None, take text.
    helps: name of a field to how its value is called, and what it means.
  """
  defaults = {field.name: field.default for field in dataclasses.fields(kind)}
  for name, (metavar, what) in helps.items():
    default = defaults[name]
    said = default not in (None, dataclasses.MISSING)
    arguments.add_argument(
      f'--{name}',
      metavar=metavar,
      type=type(default) if said else str,
      default=default if said else None,
      help=what + ' (default: %(default)s)' * said,
    )


def from_flags(kind: type, flags: argparse.Namespace) -> Any:
  """Makes a dataclass of the flags that are called as its fields."""
  names = {field.name for field in dataclasses.fields(kind)}
  return kind(**{k: v for k, v in vars(flags).items() if k in names})


def read_key(path: str) -> str:
  """Reads the key that `--api_key_file` names.

  Raises:
    ConfigError: there is no such file, or it is no text.
  """
  try:
    return Path(path).read_text('utf-8').strip()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f'--api_key_file={path} cannot be read ({error}); it holds one key'
    ) from error


def run(
  command: Callable[[Sequence[str]], int | None],
  argv: Sequence[str] | None = None,
  interrupted: str = 'interrupted',
) -> int:
  """Runs a command: errors for people go to stderr, without a traceback.

  Args:
    command: takes the arguments, returns the exit status (None for 0).
    argv: the arguments, None for those of this process.
    interrupted: what is said after Ctrl-C.

  Returns:
    The exit status: 2 after such an error, 130 after Ctrl-C.
  """
  keep_compiled()
  # Orbax logs, with a traceback, what it also raises.
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  with (
    contextlib.redirect_stdout(_Printable(sys.stdout)),
    contextlib.redirect_stderr(_Printable(sys.stderr)),
  ):
    try:
      status = command(sys.argv[1:] if argv is None else argv) or 0
      sys.stdout.flush()
      return status
    except QwenVLError as error:
      print(f'error: {error}', file=sys.stderr)
      return 2
    except KeyboardInterrupt:
      print(interrupted, file=sys.stderr)
      return 130
    except RuntimeError as error:
      # JAX's error of a device; commands that need no JAX do not import it.
      if not str(error).startswith('RESOURCE_EXHAUSTED'):
        raise
      first = str(error).partition('\n')[0]
      print(
        f'error: the device has too little memory ({first[:200]}); ask for '
        'less at a time (--slots, --max_len; in training, smaller batches), '
        'for a smaller --dtype, or use more devices',
        file=sys.stderr,
      )
      return 2
    except BrokenPipeError:  # `| head` is no error.
      _forget_stdout()
      return 0
    except OSError as error:
      if error.errno not in _DISK:
        raise
      where = error.filename or 'the output'
      print(f'error: {where}: {error.strerror}', file=sys.stderr)
      _forget_stdout()
      return 2


class _Printable(FileProxy):
  """A stream that spells out control characters: see `errors.printable`.

  All messages of commands pass here, but for Rich's, whose colours they are
  (`progress.PrintableConsole` treats the texts it is given). Around any stream
  that is no `FileProxy` its bars and spinners would put one of their own, and
  then draw through both.
  """

  def __init__(self, stream):
    super().__init__(None, stream)
    self._stream = stream

  def write(self, text: str) -> int:
    return self._stream.write(printable(text))

  def flush(self) -> None:
    self._stream.flush()


def _forget_stdout() -> None:
  """Lets Python not complain once more at exit."""
  with contextlib.suppress(OSError, ValueError):
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def keep_compiled() -> None:
  """Keeps compiled programs for later starts, in the user's cache folder.

  For this process and those that it starts. Where the environment names a
  folder (`JAX_COMPILATION_CACHE_DIR`; '' for none), that is used.
  """
  settings = {
    COMPILED: str(_cache_folder()),
    'JAX_COMPILATION_CACHE_MAX_SIZE': str(_KEPT_BYTES),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': str(_WORTH_KEEPING_SECONDS),
  }
  if os.environ.get(COMPILED) is not None:
    return
  os.environ.update(settings)
  if 'jax' in sys.modules:  # It read its environment when it was imported.
    config = sys.modules['jax'].config
    for name, value in settings.items():
      default = config.values[name.lower()]
      config.update(name.lower(), type(default)(value) if default else value)


def _cache_folder() -> Path:
  """One for each kind of processor: programs for a CPU use what it can do."""
  root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  flags = next((x for x in lines if x.startswith(('flags', 'Features'))), '')
  machine = f'{platform.machine()} {platform.processor()} {flags}'
  kind = hashlib.sha256(machine.encode()).hexdigest()[:12]
  return Path(root) / 'qwenvl_jax' / 'compiled' / kind
