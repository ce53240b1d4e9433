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

from qwenvl_jax.conversion import checkpoint_io, convert
from qwenvl_jax.errors import CheckpointError


def child(function, *arguments) -> int:
  """Forks a call; returns its pid."""
  pid = os.fork()
  if not pid:
    status = 1
    try:
      function(*arguments)
      status = 0
    finally:
      os._exit(status)
  return pid


def status(pid) -> int:
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def opens(folder) -> bool:
  try:
    checkpoint_io.read_config(folder)
  except CheckpointError:
    return False
  return True


def read(folder):
  checkpoint_io.read_params(folder, checkpoint_io.read_config(folder))


def kill_at(moments, function, source, target):
  start = time.perf_counter()
  assert status(child(function, source, target)) == 0
  seconds = time.perf_counter() - start
  for moment in moments:
    shutil.rmtree(target, ignore_errors=True)
    pid = child(function, source, target)
    time.sleep(moment * seconds)
    os.kill(pid, signal.SIGKILL)
    killed = status(pid) == -signal.SIGKILL
    print('killed' if killed else 'done')
    assert killed or target.exists()
    assert not opens(target.with_name(target.name + '.partial'))
    if target.exists():  # Renamed: all was written and synced by then.
      # In a child: what it starts here would keep TensorStore from forking.
      assert status(child(read, target)) == 0
  shutil.rmtree(target, ignore_errors=True)
  assert status(child(function, source, target)) == 0


def main(source, folder, *moments):
  folder, moments = Path(folder), [float(moment) for moment in moments]
  half = len(moments) // 2
  kill_at(moments[:half], convert.from_hf, Path(source), folder / 'ours')
  kill_at(moments[half:], convert.to_hf, folder / 'ours', folder / 'back')


if __name__ == '__main__':
  main(*sys.argv[1:])
