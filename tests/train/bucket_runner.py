"""Runs a training again and again until it ends by itself.

Started as a program: it imports everything once and forks every child before
JAX has a backend.

  bucket_runner.py WORKDIR RESULT.npz PID_FILE

Writes the number of each child to a file, so that whoever likes can kill it,
and the last state at the end; prints one JSON list of exit statuses (negative:
died of that signal).
"""

import json
import os
import pathlib
import sys
import traceback

import fake
import numpy as np

from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.loop import train


def configuration(**changes):
  return fake.line_run(
    steps=8,
    checkpoint=CheckpointConfig(every=2, keep=2),
    log_every=1,
    **changes,
  )


def leaves(state) -> dict[str, np.ndarray]:
  import jax

  values = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
  return dict(zip(fake.keys(state), values, strict=True))


def child(workdir, result, pid_file) -> int:
  pid = os.fork()
  if pid:
    return pid
  status = 1
  try:
    pathlib.Path(pid_file).write_text(str(os.getpid()))
    np.savez(result, **leaves(train(configuration(), workdir)))
    status = 0
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(status)


def main(workdir, result, pid_file):
  statuses = []
  while not statuses or statuses[-1] < 0:
    pid = child(workdir, result, pid_file)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
  print(json.dumps(statuses))


if __name__ == '__main__':
  main(*sys.argv[1:])
