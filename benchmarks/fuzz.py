"""Hostile inputs by the hundred thousand, and what became of them.

  source launch/env.sh
  python benchmarks/fuzz.py --inputs 100000

Makes configs, checkpoints, archives, tables, records and config values from
seeds (`tests/fuzzing/`), each by changing a real one, and hands them to what
reads them in the commands. Printed is a table of kinds:

  handled   refused by an error of ours, one line
  dropped   left out and counted
  accepted  read
  trace     any other exception
  hang      more than --seconds
  memory    more than --gibibytes beyond what the process had

Inputs run in processes of their own, which are replaced where one hangs or
dies. Whatever is in the last three columns is a fault: it is listed with what
makes it again, and the exit status is 1.
"""

import argparse
import collections
import importlib
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
TESTS = pathlib.Path(__file__).parents[1] / 'tests'
MODULES = ('checkpoints', 'shards', 'records', 'config_values')
GOOD = ('handled', 'dropped', 'accepted')
FAULTS = ('trace', 'hang', 'memory')
# Inputs of one task of a worker.
BATCH = 50


def kinds() -> dict:
  """Kind of input -> function of a random generator and an empty folder."""
  sys.path.insert(0, str(TESTS))
  found = {}
  for name in MODULES:
    found |= importlib.import_module(f'fuzzing.{name}').KINDS
  return found


def run_one(function, kind: str, seed: int) -> tuple[str, str]:
  """(outcome, the end of the trace if it is a fault) of one input."""
  folder = pathlib.Path(tempfile.mkdtemp())
  try:
    outcome = function(random.Random(f'{kind} {seed}'), folder)
    if outcome not in GOOD:
      return 'trace', f'{outcome!r} is no outcome'
    return outcome, ''
  except MemoryError:
    return 'memory', ''
  except Exception:
    return 'trace', ''.join(traceback.format_exc().splitlines(True)[-4:])
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def work(pipe: Connection, gibibytes: float) -> None:
  """Runs batches of inputs: (kind, first seed, one past the last)."""
  functions = kinds()
  used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  with open('/proc/self/statm') as statm:
    mapped = int(statm.read().split()[0]) * resource.getpagesize()
  limit = max(mapped, used) + int(gibibytes * 2**30)
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  # What readers print is not what is counted here.
  sys.stdout = sys.stderr = open(os.devnull, 'w')  # noqa: SIM115
  pipe.send(None)
  while (task := pipe.recv()) is not None:
    kind, first, end = task
    for seed in range(first, end):
      pipe.send((seed, *run_one(functions[kind], kind, seed)))


class Worker:
  """A process, its task, and since when its present input runs."""

  def __init__(self, context, gibibytes: float):
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(target=work, args=(theirs, gibibytes))
    self.process.start()
    theirs.close()
    self.task = None
    self.since = float('inf')  # Importing has no limit.

  def begin(self, task) -> None:
    self.task, self.since = task, time.monotonic()
    self.pipe.send(task)

  def end(self) -> None:
    self.process.kill()
    self.process.join()
    self.pipe.close()


def fuzz(tasks, workers: int, seconds: float, gibibytes: float):
  """Yields (kind, seed, outcome, trace) of all inputs.

  Args:
    tasks: (kind, first seed, one past the last), a list that is used up.
    workers: processes.
    seconds: that one input may take.
    gibibytes: that one input may need.
  """
  context = multiprocessing.get_context('spawn')
  crew = [Worker(context, gibibytes) for _ in range(workers)]

  def replace(worker, outcome):
    kind, seed, end = worker.task
    worker.end()
    crew[crew.index(worker)] = Worker(context, gibibytes)
    if seed + 1 < end:
      tasks.append((kind, seed + 1, end))
    return kind, seed, outcome, ''

  while crew:
    ready = wait([worker.pipe for worker in crew], timeout=1)
    for worker in [*crew]:
      if worker.pipe in ready:
        try:
          found = worker.pipe.recv()
        except EOFError:
          # Killed for its memory, or a crash of a library.
          yield replace(worker, 'memory')
          continue
        if found is not None:
          seed, outcome, trace = found
          kind, _, end = worker.task
          worker.task, worker.since = (kind, seed + 1, end), time.monotonic()
          yield kind, seed, outcome, trace
        if worker.task is None or worker.task[1] == worker.task[2]:
          if tasks:
            worker.begin(tasks.pop())
          else:
            crew.remove(worker)
            worker.pipe.send(None)
            worker.process.join()
      elif time.monotonic() - worker.since > seconds:
        yield replace(worker, 'hang')


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--inputs', type=int, default=100_000, help='of all kinds'
  )
  parser.add_argument('--kind', action='append', help='only this; may repeat')
  parser.add_argument('--seed', type=int, default=0, help='of the first input')
  parser.add_argument('--seconds', type=float, default=20.0)
  parser.add_argument('--gibibytes', type=float, default=1.0)
  parser.add_argument(
    '--workers', type=int, default=len(os.sched_getaffinity(0))
  )
  args = parser.parse_args()
  names = [*kinds()]
  for name in args.kind or ():
    if name not in names:
      parser.error(f'--kind={name!r} is none of {", ".join(names)}')
  names = args.kind or names
  each = -(-args.inputs // len(names))
  end = args.seed + each
  tasks = [
    (name, first, min(first + BATCH, end))
    for name in names
    for first in range(args.seed, end, BATCH)
  ]
  counts = collections.defaultdict(collections.Counter)
  faults = []
  results = fuzz(tasks, args.workers, args.seconds, args.gibibytes)
  for done, (kind, seed, outcome, trace) in enumerate(results, start=1):
    counts[kind][outcome] += 1
    if outcome in FAULTS:
      faults.append((kind, seed, outcome, trace))
    if done % 5000 == 0:
      print(f'{done} of {each * len(names)}', file=sys.stderr, flush=True)
  columns = (*GOOD, *FAULTS)
  print(f'{"kind":28s}' + ''.join(f'{name:>10s}' for name in columns))
  total = collections.Counter()
  for name in names:
    total += counts[name]
    row = ''.join(f'{counts[name][column]:10d}' for column in columns)
    print(f'{name:28s}{row}')
  print(f'{"all":28s}' + ''.join(f'{total[column]:10d}' for column in columns))
  for kind, seed, outcome, trace in faults[:20]:
    print(f'\n{outcome}: --kind={kind!r} --seed={seed} --inputs=1\n{trace}')
  sys.exit(bool(faults))


if __name__ == '__main__':
  main()
