"""A folder that appears complete or not at all.

It is written beside its place as `NAME.partial`, synced to disk and renamed. A
killed writer leaves only that sibling, which the next one clears away. In a
bucket, where no folder can be renamed, it is written to its place, which counts
as unfinished as long as it holds an object of that name.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.errors import CheckpointError

UNFINISHED = '.partial'

# For directories, metadata and what else a disk needs.
_SPARE_BYTES = 64 * 1024**2


@contextlib.contextmanager
def new_folder(destination: Path, size: int) -> Iterator[Path]:
  """The folder to write to; takes the place of `destination` at the end.

  Args:
    destination: absent or empty.
    size: bytes that will be written, to be sure now that they fit.

  Raises:
    CheckpointError: the destination is in use, another process is writing it,
      or the disk has not enough room.
  """
  if buckets.in_bucket(destination):
    with _new_in_bucket(destination):
      yield destination
    return
  destination = Path(os.path.abspath(destination))
  _check_unused(destination)
  partial = destination.with_name(destination.name + UNFINISHED)
  try:
    partial.mkdir(parents=True, exist_ok=True)
    # Whoever planted a link there would have its target emptied.
    lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
  except OSError as error:
    raise CheckpointError(
      f'{partial} cannot be made ({error.strerror}): choose another destination'
    ) from error
  try:
    _lock(lock, partial)
    _clear(partial)
    try:
      check_space(partial, size)
      yield partial
      _check_unused(destination)
      _sync(partial)
      if destination.exists():
        destination.rmdir()
      partial.rename(destination)
      _sync_one(destination.parent)
    except BaseException as error:
      shutil.rmtree(partial, ignore_errors=True)
      if isinstance(error, OSError):
        raise CheckpointError(
          f'{destination} could not be written ({error}); nothing is left of it'
        ) from error
      raise
  finally:
    os.close(lock)


@contextlib.contextmanager
def _new_in_bucket(destination: Path) -> Iterator[None]:
  mark = destination / UNFINISHED
  try:
    found = buckets.sizes(destination)
    if found and UNFINISHED not in found:
      raise CheckpointError(
        f'{destination} is not empty: choose another folder, or remove it'
      )
    buckets.remove(destination)
    buckets.write(mark, '')
    try:
      yield
    except BaseException:
      buckets.remove(destination)
      raise
    mark.unlink()
  except CheckpointError:
    raise
  except Exception as error:
    reason = buckets.unreachable(error)
    if reason is None and not isinstance(error, OSError):
      raise
    raise CheckpointError(
      f'{destination} could not be written ({reason or error}): start again, '
      'which clears away what is left of it'
    ) from error


@contextlib.contextmanager
def new_local_folder(destination: Path, size: int) -> Iterator[Path]:
  """As `new_folder`, for what can be written on a disk only.

  For a bucket that is a temporary folder, which is copied there in the end; its
  place is $TMPDIR, or what the system has for such.
  """
  if not buckets.in_bucket(destination):
    with new_folder(destination, size) as folder:
      yield folder
    return
  with (
    new_folder(destination, size),
    tempfile.TemporaryDirectory(prefix='qwenvl_jax_') as temporary,
  ):
    check_space(Path(temporary), size)
    yield Path(temporary)
    for name in sorted(buckets.sizes(Path(temporary))):
      buckets.upload(Path(temporary, name), destination / name)


def check_space(folder: Path, size: int) -> None:
  """Raises CheckpointError if `size` bytes do not fit on a folder's disk."""
  free = shutil.disk_usage(folder).free
  if free < size + _SPARE_BYTES:
    raise CheckpointError(
      f'{folder} needs {_gigabytes(size + _SPARE_BYTES)} of disk, but only '
      f'{_gigabytes(free)} are free: make room or choose another destination'
    )


def _gigabytes(size: int) -> str:
  return f'{size / 1e9:,.1f} GB' if size >= 1e8 else f'{size / 1e6:,.1f} MB'


def _check_unused(destination: Path) -> None:
  if destination.is_dir() and not any(destination.iterdir()):
    return
  if destination.exists():
    raise CheckpointError(
      f'{destination} is not empty: choose another folder, or remove it'
    )


def _lock(folder: int, path: Path) -> None:
  """Ends with the process, so that a killed one locks nobody out."""
  try:
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise CheckpointError(
      f'{path} is being written by another process: wait for it, or choose '
      'another destination'
    ) from error
  except OSError:
    pass  # A file system without locks.


def _clear(folder: Path) -> None:
  for path in folder.iterdir():
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()


def _sync(folder: Path) -> None:
  for root, _, files in os.walk(folder):
    for name in files:
      _sync_one(Path(root, name))
    _sync_one(Path(root))


def _sync_one(path: Path) -> None:
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)
