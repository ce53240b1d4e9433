"""Runs trainings of several processes, and ends some of them.

Started as a program: it imports everything once and forks every process before
JAX has a backend.

  multiprocess_runner.py RUNS.json

RUNS.json lists what `Run` says; they run one after another. Prints a JSON list
with a dict for each: `statuses` and `said` of the processes, `seconds` from the
signal (or start) to the end, the `step` of the log at the signal, whether a
checkpoint was being saved then.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import sys
import time
import traceback

import fake
import jax
import numpy as np

from qwenvl_jax.sharding import MeshConfig
from qwenvl_jax.train.checkpoint import CheckpointConfig, checksums
from qwenvl_jax.train.guard import Guard
from qwenvl_jax.train.loop import HeldOut, train
from qwenvl_jax.train.processes import find_place, joined
from qwenvl_jax.train.signals import Interrupted


@dataclasses.dataclass(frozen=True)
class Run:
  """One start of a run.

  Attributes:
    workdir: of the run; notes on rows go to `rows/`, checksums of the last
      state, as each process has it, to `checksums-PROCESS.npy`.
    processes: how many.
    devices: of each.
    mesh: sizes of the axes.
    steps: of the whole run.
    stop_at: see `train`.
    signum: sent to a process, or 0.
    victim: which process.
    after: step of the log that the signal waits for.
    delay: seconds from then.
    flip: first flip a bit in the largest file of this item of the newest step,
      and take away its manifest.
    every: steps between checkpoints.
    bad: what the rows of batches 14 to 18 are multiplied by; with a guard.
    overshoots: takes steps that are too long, with a held-out loss that ends
      the run.
    bucket: where the run's folder is instead of `workdir`, which then has the
      notes alone.
  """

  workdir: str
  processes: int = 4
  devices: int = 1
  mesh: dict = dataclasses.field(default_factory=dict)
  steps: int = 24
  stop_at: int | None = None
  signum: int = 0
  victim: int = 0
  after: int = 0
  delay: float = 0.0
  flip: str = ''
  every: int = 4
  bad: float | None = None
  overshoots: bool = False
  bucket: str = ''


def work(run: Run, attempt: int) -> int:
  """What each process does."""
  rows = pathlib.Path(run.workdir, 'rows')
  data = fake.Numbered(str(rows), attempt, pause=0.02)
  changes = {}
  if run.bad is not None:
    size = data.batch_size
    data = dataclasses.replace(
      data, bad_from=14 * size, bad_until=19 * size, bad=run.bad
    )
    changes = {
      'guard': Guard(window=6, sigmas=6.0, rise=2.0, steps=4, limit=2),
      'max_skipped': 4,
      'optimizer': {'peak': 0.02, 'end': 0.02},
    }
  if run.overshoots:
    changes = {
      'heldout': HeldOut(fake.Points(16), every=2, batches=2, patience=3),
      'optimizer': {'peak': 2.0, 'end': 2.0, 'warmup': 0},
    }
  config = fake.line_run(
    steps=run.steps,
    data=data,
    checkpoint=CheckpointConfig(every=run.every, keep=3),
    log_every=1,
    mesh=MeshConfig(**run.mesh),
    **changes,
  )
  with joined(find_place(os.environ), 30) as coordinator:
    try:
      folder = run.bucket or run.workdir
      state = train(config, folder, run.stop_at, coordinator=coordinator)
    except Interrupted as stop:
      print(stop, file=sys.stderr)
      return 128 + stop.signum
    sums = np.asarray(checksums(state))
    np.save(f'{run.workdir}/checksums-{coordinator.index}.npy', sums)
  return 0


def fork(run: Run, attempt: int, index: int, port: int, said: str) -> int:
  pid = os.fork()
  if pid:
    return pid
  status = 1
  try:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # JAX has read its environment when it was imported.
    jax.config.update('jax_num_cpu_devices', run.devices)
    if run.processes > 1:
      os.environ |= {
        'QWENVL_COORDINATOR': f'localhost:{port}',
        'QWENVL_NUM_PROCESSES': str(run.processes),
        'QWENVL_PROCESS_ID': str(index),
      }
    status = work(run, attempt)
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(status)


def flip_a_bit(run: Run) -> None:
  folder = pathlib.Path(run.workdir, 'checkpoints')
  step = max((p for p in folder.iterdir() if p.name.isdigit()), key=_number)
  (step / 'files.json').unlink()
  files = [p for p in (step / run.flip).rglob('*') if p.parent.name == 'd']
  file = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1 << random.randrange(8)
  file.write_bytes(content)


def _number(path) -> int:
  return int(path.name)


def logged(run: Run) -> int:
  """The last step of the log."""
  log = pathlib.Path(run.workdir, 'log.jsonl')
  lines = log.read_text().splitlines() if log.exists() else []
  return json.loads(lines[-1])['step'] if lines else 0


def go(run: Run, attempt: int) -> dict:
  pathlib.Path(run.workdir, 'rows').mkdir(parents=True, exist_ok=True)
  if run.flip:
    flip_a_bit(run)
  with socket.socket() as free:
    free.bind(('', 0))
    port = free.getsockname()[1]
  files = [f'{run.workdir}/said-{attempt}-{i}' for i in range(run.processes)]
  pids = [fork(run, attempt, i, port, file) for i, file in enumerate(files)]
  began, step, saving = time.monotonic(), None, False
  if run.signum:
    while logged(run) < run.after and not _ended(pids[run.victim]):
      time.sleep(0.005)
    time.sleep(run.delay)
    step, began = logged(run), time.monotonic()
    checkpoints = pathlib.Path(run.workdir, 'checkpoints')
    saving = any(checkpoints.glob('*.orbax-checkpoint-tmp*'))
    os.kill(pids[run.victim], run.signum)
  statuses = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
  return {
    'statuses': statuses,
    'said': [pathlib.Path(file).read_text() for file in files],
    'seconds': time.monotonic() - began,
    'step': step,
    'saving': saving,
  }


def _ended(pid: int) -> bool:
  """Whether a child has ended; leaves its status to be waited for."""
  return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not (
    None
  )


def main(file: str) -> None:
  signal.alarm(600)  # Whatever hangs, the tests end.
  runs = json.loads(pathlib.Path(file).read_text())
  print(json.dumps([go(Run(**run), i) for i, run in enumerate(runs)]))


if __name__ == '__main__':
  main(*sys.argv[1:])
