"""Requests that nobody should send, and how a server answers.

  source launch/env.sh
  python benchmarks/serving_fuzz.py --requests 10000

Starts `qwenvl-serve` with a tiny model that recites one answer, and sends it
requests made from seeds (`tests/fuzzing/serving.py`): bodies and their bytes,
pictures, headers, methods and routes, keys, requests that end in the middle,
and streams that are left. Printed are counts by kind and status; an answer of
5xx, none where one is owed, or one that tells of the server is a fault: it is
listed by its seed, and the exit status is 1. So are slots that are not free at
the end.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))

import reciter
from fuzzing import serving
from serve_support import command, key_file


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--requests', type=int, default=10_000)
  parser.add_argument('--seed', type=int, default=0, help='of the first one')
  parser.add_argument('--clients', type=int, default=8, help='at a time')
  args = parser.parse_args()
  counts = collections.defaultdict(collections.Counter)
  seconds = collections.Counter()
  faults = []
  with tempfile.TemporaryDirectory() as folder:
    checkpoint = pathlib.Path(folder) / 'tiny'
    reciter.save(checkpoint)
    key, named = key_file(folder)
    with command(checkpoint, named, '--slots=8', '--max_len=512') as (_, port):

      def one(seed):
        case, began = serving.make(seed, key), time.perf_counter()
        try:
          found = serving.judge(case, serving.send(port, case))
        except OSError as error:
          found = 'none', f'{type(error).__name__}: {error}'
        return seed, case.kind, *found, time.perf_counter() - began

      seeds = range(args.seed, args.seed + args.requests)
      with concurrent.futures.ThreadPoolExecutor(args.clients) as pool:
        answers = pool.map(one, seeds)
        for done, (seed, kind, status, wrong, took) in enumerate(answers, 1):
          counts[kind][status] += 1
          seconds[kind] += took
          if wrong:
            faults.append(f'--seed={seed} --requests=1: {kind} {wrong}')
          if done % 1000 == 0:
            print(f'{done} of {args.requests}', file=sys.stderr, flush=True)
      busy = serving.still_busy(port, key)
  columns = sorted(set().union(*counts.values()))
  print(f'{"kind":10s}' + ''.join(f'{name:>7s}' for name in columns) + '   ms')
  total = sum(counts.values(), collections.Counter())
  for kind, row in [*counts.items(), ('all', total)]:
    cells = ''.join(f'{row[name]:7d}' for name in columns)
    mean = 1000 * sum(seconds[x] for x in counts if kind in (x, 'all'))
    print(f'{kind:10s}{cells}{mean / row.total():5.0f}')
  print(f'requests that still held a slot at the end: {busy}')
  print('\n'.join(faults[:20]))
  sys.exit(bool(faults or busy))


if __name__ == '__main__':
  main()
