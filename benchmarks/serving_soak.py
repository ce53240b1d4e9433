"""A server among slow, silent and vanishing clients, for half an hour.

  source launch/env.sh
  python benchmarks/serving_soak.py --minutes 30

Starts `qwenvl-serve` with a tiny model that recites one answer. Beside clients
that ask and check the answer, there are some that send and read a little at a
time, say nothing, do not read, leave, send 40 MiB, and come by the hundred
(`tests/fuzzing/clients.py`). Printed are the server's resident memory, open
files and threads each minute, answers by kind and status, and whether slots are
free at the end. The exit status is 1 if an answer was 5xx or wrong, or a slot
is not free.
"""

import argparse
import asyncio
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))

import reciter
from fuzzing import serving
from fuzzing.clients import Clients
from serve_support import command, key_file


def usage(pid: int) -> tuple[float, int, int]:
  """(resident MiB, open files, threads) of a process."""
  process = pathlib.Path('/proc', str(pid))
  pages = int((process / 'statm').read_text().split()[1])
  return (
    pages * os.sysconf('SC_PAGE_SIZE') / 2**20,
    len(os.listdir(process / 'fd')),
    len(os.listdir(process / 'task')),
  )


def say(began: float, pid: int, clients: Clients) -> None:
  memory, files, threads = usage(pid)
  print(
    f'{(time.monotonic() - began) / 60:5.1f} min: {memory:6.0f} MiB, '
    f'{files:4d} files, {threads:3d} threads; '
    f'{clients.counts.total()} requests, {clients.failures} of 5xx, '
    f'{len(clients.wrong)} wrong',
    flush=True,
  )


async def soak(clients: Clients, pid: int, seconds: float, every: float):
  """Lets the clients ask, and prints what the server needs."""
  began = time.monotonic()
  asking = asyncio.create_task(clients.run(seconds))
  while not asking.done():
    say(began, pid, clients)
    await asyncio.wait({asking}, timeout=every)
  await asking
  say(began, pid, clients)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--minutes', type=float, default=30)
  parser.add_argument('--every', type=float, default=60, help='seconds')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    checkpoint = pathlib.Path(folder) / 'tiny'
    reciter.save(checkpoint)
    key, named = key_file(folder)
    sizes = '--slots=8', '--max_len=512'
    with command(checkpoint, named, *sizes) as (process, port):
      clients = Clients(port, key, reciter.ANSWER)
      asyncio.run(soak(clients, process.pid, 60 * args.minutes, args.every))
      busy = serving.still_busy(port, key)
      cache = serving.measured(port, key, 'kv_cache_usage_perc')
      memory, files, threads = usage(process.pid)
  for (kind, status), count in sorted(clients.counts.items()):
    print(f'{kind:10s} {status:7s} {count:7d}')
  print(
    f'at the end: {busy} requests hold or want a slot, {cache:.0%} of the '
    f'cache is used, {memory:.0f} MiB, {files} files, {threads} threads'
  )
  for text in clients.wrong[:5]:
    print(f'wrong: {text!r}')
  sys.exit(bool(clients.failures or clients.wrong or busy or cache))


if __name__ == '__main__':
  main()
