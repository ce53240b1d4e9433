"""Kills processes of a run at random moments and counts what survives.

  python benchmarks/survival.py [--kills 10] [--processes 4] [--seed 0]

A run of several real processes on this machine (the stand-in of the tests: a
small model, real checkpoints, data and collectives) is killed with SIGKILL, one
random process at a random moment, and started again, until it has been killed
so often and has ended. Prints a line for each kill, and whether the last state
is bit-identical to that of a run that nobody disturbed, and each row was read
once.
"""

import argparse
import collections
import os
import pathlib
import random
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests' / 'train')]
os.environ['JAX_PLATFORMS'] = 'cpu'


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--processes', type=int, default=4)
  parser.add_argument('--seed', type=int, default=int(time.time()))
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='survival_') as folder:
    # Compiled once, not at each start.
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{folder}/compiled')
    return _measure(flags, pathlib.Path(folder))


def _measure(flags, folder: pathlib.Path) -> int:
  import multiprocess_runner
  import numpy as np

  steps = 6 * flags.kills + 12
  common = {'processes': flags.processes, 'steps': steps}
  calm = multiprocess_runner.Run(str(folder / 'calm'), **common)
  assert multiprocess_runner.go(calm, 0)['statuses'] == [0] * flags.processes

  rng = random.Random(flags.seed)
  print(f'seed {flags.seed}, {flags.processes} processes, {steps} steps')
  workdir, attempt, seconds = str(folder / 'run'), 0, []
  moments, others = collections.Counter(), collections.Counter()
  while attempt < flags.kills:
    run = multiprocess_runner.Run(workdir, **common)
    done = multiprocess_runner.logged(run)
    # A third anywhere from the start on, the rest while it trains.
    after, delay = done + rng.randint(1, 5), rng.uniform(0, 0.5)
    if rng.random() < 1 / 3:
      after, delay = 0, rng.uniform(0, 5)
    victim = rng.randrange(flags.processes)
    run = multiprocess_runner.Run(
      workdir, **common, signum=9, victim=victim, after=after, delay=delay
    )
    result = multiprocess_runner.go(run, attempt)
    attempt += 1
    assert result['statuses'][victim] == -9, result
    survivors = [s for i, s in enumerate(result['statuses']) if i != victim]
    named = [
      f'process {victim} of' in said or f'missing {victim}' in said
      for i, said in enumerate(result['said'])
      if i != victim
    ]
    others.update(survivors)
    others['named the lost one'] += sum(named)
    moment = 'starting' if result['step'] <= done else 'training'
    moment = 'saving' if result['saving'] else moment
    moments[moment] += 1
    seconds.append(result['seconds'])
    print(
      f'kill {attempt}: process {victim} while {moment}, after step '
      f'{result["step"]}; the others ended with {survivors} in '
      f'{result["seconds"]:.1f} s, {sum(named)} named it',
      flush=True,
    )
  last = multiprocess_runner.go(
    multiprocess_runner.Run(workdir, **common), attempt
  )
  assert last['statuses'] == [0] * flags.processes, last
  same = np.array_equal(
    np.load(f'{workdir}/checksums.npy'),
    np.load(f'{calm.workdir}/checksums.npy'),
  )
  print(f'kills: {dict(moments)}; statuses of the others: {dict(others)}')
  print(
    f'seconds until the others ended: median {np.median(seconds):.1f}, '
    f'largest {max(seconds):.1f}'
  )
  print(f'last state bit-identical to the undisturbed run: {same}')
  return 0 if same else 1


if __name__ == '__main__':
  sys.exit(main())
