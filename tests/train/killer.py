"""Runs a training in child processes and ends them as a test asks.

Started as a program: it imports everything once and forks every child before
JAX has a backend, so that a restart costs a second instead of ten.

  killer.py WORKDIR RESULT.npz SIGNAL SECONDS [SECONDS ..]

Starts the same run again and again, each time sending SIGNAL so many seconds
after its first step; then once more until it ends. Writes the last state, and
prints one JSON list of exit statuses (negative: died of that signal).
"""

import json
import os
import pathlib
import sys
import time

import fake
import numpy as np

from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.signals import Interrupted


def run(workdir, result):
  """What one child does."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  config = fake.line_run(
    steps=60,
    data=fake.Points(pause=0.02),
    checkpoint=CheckpointConfig(every=3, keep=2),
    log_every=1,
  )
  try:
    state = train(config, workdir)
  except Interrupted as stop:
    print(stop, file=sys.stderr)
    return 128 + stop.signum
  leaves = dict(zip(fake.keys(state), _leaves(state), strict=True))
  np.savez(result, **leaves)
  return 0


def _leaves(tree):
  import jax

  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def child(workdir, result):
  """Forks a child; returns its pid."""
  pid = os.fork()
  if pid:
    return pid
  status = 1
  try:
    status = run(workdir, result)
  finally:
    sys.stderr.flush()
    os._exit(status)


def main(workdir, result, signum, *seconds):
  statuses = []
  log = pathlib.Path(workdir) / 'log.jsonl'
  for delay in map(float, seconds):
    pid = child(workdir, result)
    before = log.stat().st_mtime_ns if log.exists() else 0
    while not (log.exists() and log.stat().st_mtime_ns > before):
      time.sleep(0.005)
      if os.waitpid(pid, os.WNOHANG)[0]:
        raise SystemExit('the run ended before its first step')
    time.sleep(delay)
    os.kill(pid, int(signum))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
  statuses.append(
    os.waitstatus_to_exitcode(os.waitpid(child(workdir, result), 0)[1])
  )
  print(json.dumps(statuses))


if __name__ == '__main__':
  main(*sys.argv[1:])
