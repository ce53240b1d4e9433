"""What a disk or a bucket can do to checkpoints, said in a line."""

import contextlib
import errno
import sys
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.errors import CheckpointError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_WORDS = ('No space left', 'Disk quota exceeded', 'File too large')


class NoLateCallbacks:
  """Keeps reads and writes that run on after a failed one from printing.

  TensorStore reports each to an event loop that Orbax has closed by then, and
  Python prints what it cannot raise, up to its very end.
  """

  def __init__(self):
    self.failed = False
    self._before = sys.unraisablehook
    sys.unraisablehook = self._hook

  def _hook(self, unraisable):
    text = str(unraisable.exc_value)
    late = ('Event loop is closed', 'Python is likely shutting down')
    if not any(words in text for words in late):
      self._before(unraisable)

  def close(self):
    if not self.failed and sys.unraisablehook == self._hook:
      sys.unraisablehook = self._before


@contextlib.contextmanager
def explained(doing: str, folder: Path):
  """Turns what a file system can do to us into a `CheckpointError`."""
  try:
    yield
  except Exception as error:
    if buckets.in_bucket(folder):
      reason = buckets.unreachable(error)
      if reason is None:
        raise
      raise CheckpointError(refusal(doing, reason)) from error
    reason = _file_system_reason(error)
    if reason is None:
      raise
    valid = _steps_on_disk(folder)
    raise CheckpointError(
      f'{doing} failed: {reason}. '
      + (
        f'Complete and valid in {folder}: step(s) {valid}'
        if valid
        else f'{folder} holds no complete step'
      )
      + '. Make room or lower CheckpointConfig.keep, then start the same '
      'command again to go on from there'
    ) from error


def refusal(doing: str, reason: str) -> str:
  """Returns what to say of a bucket that refused something, with remedies."""
  return (
    f'{doing} failed: {reason}. Does the bucket exist, may this account read '
    'and write its objects and see the bucket itself (roles '
    'storage.objectAdmin and storage.legacyBucketReader), and does the network '
    'reach it? Start the same command again to go on from the newest checkpoint'
  )


def _file_system_reason(error: BaseException) -> str | None:
  """What the file system said, from anywhere in a chain of exceptions.

  TensorStore reports a full disk as a ValueError that only says so in words.
  """
  seen = error
  while seen is not None:
    full = isinstance(seen, OSError) and seen.errno in _NO_SPACE
    if full or any(words in str(seen) for words in _NO_SPACE_WORDS):
      return 'the disk is full (no space left, or over a quota)'
    if isinstance(seen, OSError):
      return first_line(seen)
    seen = seen.__cause__ or seen.__context__
  return None


def first_line(error: BaseException) -> str:
  """Returns the first line of an error, at most 200 characters of it."""
  lines = str(error).split('See full TensorStore')[0].strip().splitlines()
  text = lines[0] if lines else type(error).__name__
  return text if len(text) <= 200 else text[:200] + '...'


def _steps_on_disk(folder: Path) -> list[int]:
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
