"""Files that grow, of a run whose folder is a bucket.

An object cannot be appended to. So the log, the TensorBoard events and profiles
grow in a folder of this machine, and are copied to the bucket whole: once a
minute in a thread of their own, before each checkpoint, and at the end. What a
kill takes along is of steps after the last checkpoint, which the run takes
again.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qwenvl_jax import buckets

# Seconds between two copies.
_INTERVAL_S = 60.0


class LogUpload:
  """A folder of this machine whose files are copied to a bucket."""

  def __init__(self, place: Path, warn: Callable[[str], None]):
    """Makes an empty folder; nothing is copied yet.

    Args:
      place: folder in a bucket.
      warn: told if copying fails; it is tried again, and a run does not end for
        its logs.
    """
    self._place = place
    self._warn = warn
    self._temporary = tempfile.TemporaryDirectory(prefix='qwenvl_jax_')
    self.folder = Path(self._temporary.name)
    self._copied: dict[str, int] = {}
    self._failed = False
    self._thread = None
    self._began = time.monotonic()

  def fetch(self, name: str) -> Path:
    """Where a file grows here, begun with what the bucket has of it."""
    if (self._place / name).exists():
      data = (self._place / name).read_bytes()
      (self.folder / name).write_bytes(data)
    return self.folder / name

  def now_and_then(self) -> None:
    """Starts copying if the last copy is a while ago; does not wait."""
    if time.monotonic() - self._began < _INTERVAL_S:
      return
    if self._thread is None or not self._thread.is_alive():
      self._began = time.monotonic()
      self._thread = threading.Thread(
        target=self._copy, name='log upload', daemon=True
      )
      self._thread.start()

  def flush(self) -> None:
    """Copies what has changed, and waits for it."""
    if self._thread is not None:
      self._thread.join()
    self._copy()

  def close(self) -> None:
    self.flush()
    self._temporary.cleanup()

  def _copy(self) -> None:
    try:
      for name, size in buckets.sizes(self.folder).items():
        if self._copied.get(name) != size:
          buckets.upload(self.folder / name, self._place / name)
          self._copied[name] = size
      self._failed = False
    except Exception as error:
      reason = buckets.unreachable(error)
      if reason is None and not isinstance(error, OSError):
        raise
      if not self._failed:
        self._warn(
          f'warning: {self._place}: files cannot be copied there '
          f'({reason or error}); the log is tried again until the end'
        )
      self._failed = True
