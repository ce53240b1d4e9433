"""Folders of a file system, or of a bucket in Cloud Storage (`gs://`).

A path is a `pathlib.Path`, or for a bucket etils' `epath.Path`, which share
what is used of them. Where the two differ is here: in a bucket an object
appears whole, replaces what was there, and is seen by everybody at once; it
cannot be appended to, and folders exist only as parts of names, so that none
can be made or renamed.
"""

import contextlib
import errno
import importlib.util
import io
import logging
import os
import re
import shutil
import stat
import tempfile
import traceback
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from etils import epath

from qwenvl_jax.errors import ConfigError, QwenVLError

_SCHEME = 'gs://'

# What `copy` takes: a vocabulary, settings, licences, a font.
_SMALL_BYTES = 2**28

# Whose exceptions tell of the network, of permissions or credentials.
_OTHERS = (
  'gcsfs.',
  'google.api_core.',
  'google.auth.',
  'google.cloud.',
  'aiohttp.',
  'requests.',
  'urllib3.',
)

# What gcsfs and TensorStore say in exceptions that say nothing by their kind.
_REFUSED = re.compile(
  r'\b(Forbidden: |PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|'
  r'DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)'
)


def as_path(text: str | os.PathLike) -> Path:
  """The path that a person named; `~` is expanded.

  Raises:
    ConfigError: it names no bucket, a store of another kind, or what opens
      buckets is not installed.
  """
  if isinstance(text, epath.Path) and in_bucket(text):
    return text
  name = os.fspath(text)
  if not name:
    raise ConfigError("a folder or file is named ''; the current folder is '.'")
  if '://' not in name:
    return Path(name).expanduser()
  if not re.match(r'gs://[^/]', name):
    raise ConfigError(
      f'{name} is neither a folder nor a bucket (gs://BUCKET/FOLDER)'
    )
  if not importlib.util.find_spec('gcsfs'):
    raise ConfigError(
      f"{name} is in a bucket: pip install 'qwenvl_jax[gcs]', which opens them"
    )
  _set_up()
  return epath.Path(name)


def in_bucket(path: str | os.PathLike) -> bool:
  """Returns whether a path is of a bucket (gs://)."""
  return os.fspath(path).startswith(_SCHEME)


def absolute(path: Path) -> Path:
  """Returns a path that holds whatever the working directory becomes."""
  return path if in_bucket(path) else path.absolute()


def split(path: Path) -> tuple[str, str]:
  """Bucket and name of an object."""
  bucket, _, name = os.fspath(path).removeprefix(_SCHEME).partition('/')
  return bucket, name


def make_folder(path: Path) -> None:
  """Makes a folder where that is needed.

  Raises:
    OSError: it cannot be made, or there is no such bucket.
  """
  if not in_bucket(path):
    path.mkdir(parents=True, exist_ok=True)
  elif not _files().exists(split(path)[0]):
    raise FileNotFoundError(
      f'there is no bucket {split(path)[0]}, or not for these credentials: '
      f'gcloud storage buckets create gs://{split(path)[0]} makes one'
    )


def hold(folder: Path) -> None:
  """Lets a bucket's folder be there when nothing is in it, as on a disk."""
  if in_bucket(folder):
    write(folder / '.folder', '')


def write(path: Path, content: str | bytes) -> None:
  """Writes a file that appears whole or not at all, instead of an old one."""
  data = content.encode() if isinstance(content, str) else content
  if in_bucket(path):
    _files().pipe_file(_key(path), data)
    return
  with atomic_write(path) as local:
    local.write_bytes(data)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
  """Makes OSErrors of what array_record raises for those of a disk."""
  try:
    yield
  except RuntimeError as error:
    what, failed, cause = str(error).partition('() failed: ')
    if not failed or what not in ('open', 'write'):
      raise
    reason = cause.partition(';')[0]
    raise OSError(errno.EIO, reason, os.fspath(path)) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
  """Gives a local file to write to, which becomes `path` if all goes well.

  However the program ends, there is the whole new file, or the old one or none.
  A killed one may leave a file for `remove_partial`, which nothing reads.

  Raises:
    OSError: the disk is full, or refuses, also where array_record writes.
  """
  path = as_path(path)
  with _disk_errors(path), contextlib.ExitStack() as stack:
    if in_bucket(path):
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      local = Path(folder, path.name)
      yield local
      upload(local, path)
      return
    local = path.with_name(f'.{path.name[:200]}.{uuid.uuid4().hex[:8]}.partial')
    try:
      yield local
      os.replace(local, path)
    except BaseException:
      with contextlib.suppress(OSError):
        local.unlink(missing_ok=True)
      raise


def remove_partial(folder: Path) -> None:
  """Removes what killed programs left in a folder."""
  for left in folder.glob('.*.partial'):
    left.unlink(missing_ok=True)


def upload(file: Path, path: Path) -> None:
  """Copies a file of this machine to an object, in pieces."""
  _files().put_file(str(file), _key(path))


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
  """Gives a file of this machine with the contents of an object; or itself."""
  path = as_path(path)
  if not in_bucket(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as folder:
    local = Path(folder, path.name)
    _files().get_file(_key(path), str(local))
    yield local


def version(path: Path) -> tuple:
  """What changes when a file is written again.

  Raises:
    OSError: there is no such file.
  """
  if in_bucket(path):
    return (str(_files().info(_key(path))['generation']),)
  found = path.stat()
  return found.st_mtime_ns, found.st_size


def copy(file: Path, destination: Path) -> None:
  """Copies a small file, from or to anywhere."""
  write(destination, read(file, _SMALL_BYTES))


def read(path: Path, limit: int) -> bytes:
  """Reads a regular file that is not longer than it may be.

  Raises:
    OSError: it is no file (but a folder or a pipe), longer, or unreadable.
  """
  with open_regular(path) as file:
    content = file.read(limit + 1)
  if len(content) > limit:
    raise OSError(errno.EFBIG, f'more than {limit:,} bytes', os.fspath(path))
  return content


def sizes(folder: Path) -> dict[str, int]:
  """Bytes of all files under a folder, by their path within it."""
  if not in_bucket(folder):
    return {
      path.relative_to(folder).as_posix(): path.stat().st_size
      for path in folder.rglob('*')
      if path.is_file()
    }
  # One request for a thousand objects, not one for each.
  found = _files().find(_key(folder), detail=True)
  start = len(_key(folder)) + 1
  return {
    name[start:]: info['size']
    for name, info in found.items()
    if not name.endswith('/')
  }


def contents(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
  """Contents of files under a folder; of a bucket, many at a time."""
  names = list(names)
  if in_bucket(folder):
    keys = {f'{_key(folder)}/{name}': name for name in names}
    found = _files().cat(list(keys)) if keys else {}
    yield from ((keys[key], data) for key, data in found.items())
  else:
    yield from ((name, (folder / name).read_bytes()) for name in names)


def open_regular(path: Path) -> BinaryIO:
  """Opens a file to read bytes; pipes and devices may never end.

  Raises:
    OSError: it is not there, or no regular file.
  """
  if in_bucket(path):
    return io.BufferedReader(path.open('rb'))
  # Without waiting for somebody to write to a pipe.
  number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  if not stat.S_ISREG(os.fstat(number).st_mode):
    os.close(number)
    raise OSError(errno.EINVAL, 'not a regular file', os.fspath(path))
  return os.fdopen(number, 'rb')


def size(path: Path) -> int:
  """Bytes of a file."""
  if in_bucket(path):
    return _files().info(_key(path))['size']
  return path.stat().st_size


def read_into(path: Path, start: int, array: np.ndarray) -> int:
  """Fills an array with bytes of a file from a place on.

  Args:
    path: the file.
    start: its first byte to be read.
    array: C-ordered, of any shape and dtype.

  Returns:
    How many bytes there were: fewer than the array has at the file's end.
  """
  memory = array.reshape(-1, copy=False).view(np.uint8)
  if in_bucket(path):
    end = start + memory.size
    found = _files().cat_file(_key(path), start=start, end=end)
    memory[: len(found)] = np.frombuffer(found, np.uint8)
    return len(found)
  with open_regular(path) as file:
    file.seek(start)
    return file.readinto(memory)


def move(folder: Path, destination: Path, first: str) -> None:
  """Moves a folder; one that is there already is replaced.

  Args:
    folder: to be moved.
    destination: to where.
    first: the file without which the folder is invalid. In a bucket objects
      are copied and deleted one by one: it goes first, so that what is left if
      this is interrupted does not look whole.
  """
  remove(destination)
  if not in_bucket(folder):
    destination.parent.mkdir(exist_ok=True)
    folder.rename(destination)
    return
  (folder / first).unlink(missing_ok=True)
  names = [name for name in sizes(folder) if name != first]
  old, new = (
    [f'{_key(place)}/{name}' for name in names]
    for place in (folder, destination)
  )
  if names:
    _files().copy(old, new)
  remove(folder)


def remove(folder: Path) -> None:
  """Removes a folder with all it holds, if it is there."""
  if not in_bucket(folder):
    shutil.rmtree(folder, ignore_errors=True)
  elif names := list(sizes(folder)):
    _files().rm([f'{_key(folder)}/{name}' for name in names])


def unreachable(error: BaseException) -> str | None:
  """What Cloud Storage says that is no fault of an object; else None.

  It does not answer, or refuses; what is there may be in best order. Looked
  for anywhere in a chain of exceptions.
  """
  seen = error
  while seen is not None:
    if _is_theirs(seen) or _REFUSED.search(str(seen)):
      lines = str(seen).split('See full TensorStore')[0].strip().splitlines()
      return ': '.join(lines[:2])[:300] or type(seen).__name__
    seen = seen.__cause__ or seen.__context__
  return None


def _is_theirs(error: BaseException) -> bool:
  return f'{type(error).__module__}.'.startswith(_OTHERS)


@contextlib.contextmanager
def refusals_told() -> Iterator[None]:
  """What runs under this tells people of a bucket that they may not use.

  Raises:
    ConfigError: in place of what the clients of Cloud Storage raise.
  """
  try:
    yield
  except QwenVLError as error:
    _forget_locals(error)
    raise
  except Exception as error:
    _forget_locals(error)
    if not (_is_theirs(error) or str(error).startswith('Forbidden: ')):
      raise
    raise ConfigError(
      f'Cloud Storage refuses: {unreachable(error)}. Is somebody logged in '
      '(gcloud auth application-default login), and may that account use the '
      'bucket?'
    ) from error


def _forget_locals(error: BaseException) -> None:
  """Clears the local variables of the calls that an exception ended.

  fsspec's refer to the exception, which is garbage with all of them then. One
  may be a view of what gcsfs was to write, and of Python 3.12.0 and 3.12.1 the
  collector crashes at those (python/cpython#111049).
  """
  while error is not None:
    traceback.clear_frames(error.__traceback__)
    error = error.__cause__ or error.__context__


def _key(path: Path) -> str:
  return os.fspath(path).removeprefix(_SCHEME).rstrip('/')


def _files() -> fsspec.AbstractFileSystem:
  return fsspec.filesystem('gcs')


def _set_up() -> None:
  # Whoever catches an error says it; these would print it, traceback and all.
  for name in ('fsspec', 'gcsfs'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  logging.getLogger('google.auth').setLevel(logging.ERROR)
  # TensorStore and other hosts change folders that gcsfs would remember.
  for name in ('gs', 'gcs'):
    fsspec.config.conf.setdefault(name, {})['use_listings_cache'] = False
