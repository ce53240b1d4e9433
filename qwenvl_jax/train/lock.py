"""One process at a time writes to a run's folder.

On a disk, the lock is the system's (`flock`): it ends with the process that
holds it, whatever ended that. A bucket has no locks: there, the holder writes
an object again and again, and who finds one waits whether it changes.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError

LOCK_FILE = 'lock'

# Seconds to wait for a process that is about to end (a lost one may stand in a
# collective for a few).
WAIT_S = 10.0

# Seconds between two signs of life in a bucket, and without one until its
# writer counts as dead: one may be late.
BEAT_INTERVAL_S = 20.0
BEAT_TIMEOUT_S = 75.0


@contextlib.contextmanager
def locked(
  workdir: Path, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
  """Holds the lock of a run's folder.

  Args:
    say: told what takes time, and if the folder knows no locks.

  Yields:
    A function that raises ConfigError if another process took the lock away,
    which only happens in a bucket.

  Raises:
    ConfigError: another process holds it; names it.
    OSError: the lock cannot be written.
  """
  now = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())
  me = f'process {os.getpid()} on {socket.gethostname()} since {now}'
  if buckets.in_bucket(workdir):
    with _in_bucket(workdir / LOCK_FILE, me, say) as check:
      yield check
  else:
    with _on_disk(workdir / LOCK_FILE, me, say):
      yield lambda: None


def _taken(path: Path, holder: str) -> ConfigError:
  return ConfigError(
    f'--workdir {path.parent} is in use by {holder or "another process"}: two '
    'would overwrite each other. Wait for it, end it, or take another --workdir'
  )


@contextlib.contextmanager
def _on_disk(path: Path, me: str, say) -> Iterator[None]:
  # Not for those that this process forks: the lock would outlive it.
  with path.open('a+') as file:
    if not _flock(file, say):
      file.seek(0)
      raise _taken(path, file.read(200).strip())
    file.truncate(0)
    file.write(me)
    file.flush()
    try:
      yield
    finally:
      file.truncate(0)
      # Also for a process forked meanwhile, which would hold it on.
      with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)


def _flock(file, say) -> bool:
  """Whether the lock is ours now."""
  deadline = time.monotonic() + WAIT_S
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      if time.monotonic() >= deadline:
        return False
    except OSError as error:
      say(
        f'warning: {file.name}: this file system knows no locks '
        f'({error.strerror}): see to it that one process at a time writes here'
      )
      return True
    time.sleep(0.1)


@contextlib.contextmanager
def _in_bucket(path: Path, me: str, say) -> Iterator[Callable[[], None]]:
  holder = _read(path)
  if holder and not _gone(holder):
    say(
      f'{path} names {holder["holder"]}: waiting up to '
      f'{BEAT_TIMEOUT_S:.0f} s for a sign of life of it'
    )
    deadline = time.monotonic() + BEAT_TIMEOUT_S
    while (found := _read(path)) == holder:
      if time.monotonic() >= deadline:
        break
      time.sleep(min(1.0, BEAT_TIMEOUT_S / 10))
    else:
      if found:
        raise _taken(path, found['holder'])
  mine = {
    'holder': me,
    'host': socket.gethostname(),
    'boot': _boot(),
    'pid': os.getpid(),
    'id': uuid.uuid4().hex,
  }
  buckets.write(path, json.dumps(mine))
  over, other = threading.Event(), []

  def beat() -> None:
    count = 0
    while not over.wait(BEAT_INTERVAL_S):
      # What a bucket refuses now is told by what else is written there.
      with contextlib.suppress(Exception):
        found = _read(path)
        if found and found.get('id') != mine['id']:
          other.append(found['holder'])
          return
        count += 1
        buckets.write(path, json.dumps(mine | {'beat': count}))

  def check() -> None:
    if other:
      raise _taken(path, other[0])

  thread = threading.Thread(target=beat, name='lock', daemon=True)
  thread.start()
  try:
    yield check
  finally:
    over.set()
    thread.join()
    if not other:
      with contextlib.suppress(Exception):
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict | None:
  """The lock's object; None if there is none, or none of ours."""
  try:
    found = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return None
  return found if isinstance(found, dict) and 'holder' in found else None


def _gone(holder: dict) -> bool:
  """Whether the holder was a process of this machine that has ended."""
  if (holder.get('host'), holder.get('boot')) != (
    socket.gethostname(),
    _boot(),
  ):
    return False
  return not Path('/proc', str(holder.get('pid'))).exists()


def _boot() -> str:
  try:
    return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  except OSError:
    return ''
