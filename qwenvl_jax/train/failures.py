"""What a disk does to checkpoints, said in a line."""

import errno
import sys

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


def file_system_reason(error: BaseException) -> str | None:
  """Returns what the file system said, from anywhere in a chain of exceptions.

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
