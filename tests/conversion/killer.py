"""Converts in child processes and kills them as a test asks.

Started as a program: it imports everything once and forks every child, so that
a restart costs no imports.

  killer.py SOURCE FOLDER MOMENT [MOMENT ..]

Converts SOURCE to FOLDER/ours and that to FOLDER/back, each first as a trial
that tells how long it takes. Children are then killed after MOMENT (between 0
and 1) of that time. Prints 'killed' or, where the child was faster, 'done'.
Ends with a conversion that nobody kills.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion import folder as folders
from qwenvl_jax.errors import CheckpointError


def child(name, source, target) -> int:
  """Forks a conversion; returns its pid."""
  pid = os.fork()
  if not pid:
    status = 1
    try:
      getattr(convert, name)(source, target)
      status = 0
    finally:
      os._exit(status)
  return pid


def status(pid) -> int:
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def opens(folder) -> bool:
  try:
    folders.read_config(folder)
  except CheckpointError:
    return False
  return True


def kill_at(moments, name, source, target):
  start = time.perf_counter()
  assert status(child(name, source, target)) == 0
  seconds = time.perf_counter() - start
  for moment in moments:
    shutil.rmtree(target, ignore_errors=True)
    pid = child(name, source, target)
    time.sleep(moment * seconds)
    os.kill(pid, signal.SIGKILL)
    killed = status(pid) == -signal.SIGKILL
    print('killed' if killed else 'done')
    assert killed or target.exists()
    assert not opens(target.with_name(target.name + '.partial'))
    if target.exists():  # Renamed: all was written and synced by then.
      folders.read_params(target, folders.read_config(target))
  shutil.rmtree(target, ignore_errors=True)
  assert status(child(name, source, target)) == 0


def main(source, folder, *moments):
  folder, moments = Path(folder), [float(moment) for moment in moments]
  half = len(moments) // 2
  kill_at(moments[:half], 'from_hf', Path(source), folder / 'ours')
  kill_at(moments[half:], 'to_hf', folder / 'ours', folder / 'back')


if __name__ == '__main__':
  main(*sys.argv[1:])
