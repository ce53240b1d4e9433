"""Opens a checkpoint of the release's size, beside reading its files.

  python benchmarks/load_full_size.py --folder SCRATCH

Makes a synthetic Qwen-VL in the released layout (19.3 GB in bfloat16), and from
it a converted checkpoint; or takes one that is there (--checkpoint). Of each,
with its files out of the page cache, measures by turns

  read   all files, one after the other, in pieces of 16 MiB
  load   qwenvl_jax.load, until all parameters are in place

each in a process of its own, without the time that imports take. Prints every
pair, the median of their ratios, and the peak of resident memory above what the
parameters take and the interpreter with its imports; exits with status 1 if the
ratio exceeds 1.3 or the memory 1 GiB. Needs 40 GB of disk, which is free again
in the end, and memory for the parameters.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile

from convert_full_size import forget, make

MAX_RATIO, MAX_GIB = 1.3, 1.0
NEEDED = 40 * 10**9

_READ = """
import json, os, sys, time
buffer, start = memoryview(bytearray(2**24)), time.perf_counter()
for root, _, names in sorted(os.walk(sys.argv[1])):
  for name in sorted(names):
    with open(os.path.join(root, name), 'rb', buffering=0) as file:
      while file.readinto(buffer):
        pass
print(json.dumps({'seconds': time.perf_counter() - start}))
"""

_LOAD = """
import json, sys, time
import jax
import qwenvl_jax

def status(key):
  for line in open('/proc/self/status'):
    if line.startswith(key):
      return int(line.split()[1]) * 1024

# If memory runs short, this process goes and no other.
with open('/proc/self/oom_score_adj', 'w') as file:
  file.write('1000')
jax.devices()
before, start = status('VmRSS'), time.perf_counter()
params = jax.block_until_ready(qwenvl_jax.load(sys.argv[1]).params)
seconds = time.perf_counter() - start
size = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({
  'seconds': seconds,
  'size': size,
  'above': status('VmHWM') - before - size,
}))
"""


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--folder',
    type=pathlib.Path,
    default=pathlib.Path(tempfile.gettempdir()),
    help='on the disk to measure (default: %(default)s)',
  )
  parser.add_argument(
    '--checkpoint',
    type=pathlib.Path,
    help='measure this one rather than synthetic ones',
  )
  parser.add_argument(
    '--layers',
    type=int,
    default=32,
    help='of the decoder; fewer for a quick look (default: the release)',
  )
  parser.add_argument(
    '--rounds', type=int, default=3, help='pairs (default: %(default)s)'
  )
  args = parser.parse_args()
  if args.checkpoint is not None:
    return int(not measure(args.checkpoint, args.rounds))
  free = shutil.disk_usage(args.folder).free
  if args.layers == 32 and free < NEEDED:
    print(
      f'{args.folder} has {free / 1e9:.0f} GB free, {NEEDED / 1e9:.0f} are '
      'needed: choose another --folder',
      file=sys.stderr,
    )
    return 2
  # Clean up as after control-C.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
    released, ours = (pathlib.Path(scratch, n) for n in ('released', 'ours'))
    make(released, args.layers, pickled=False)
    good = measure(released, args.rounds)
    subprocess.run(
      [sys.executable, '-m', 'qwenvl_jax.conversion.cli']
      + ['from-hf', released, ours],
      check=True,
    )
    shutil.rmtree(released)
    good &= measure(ours, args.rounds)
  return int(not good)


def measure(folder: pathlib.Path, rounds: int) -> bool:
  """Reads and loads by turns; prints, and returns whether limits are kept."""
  print(f'{folder.name}', flush=True)
  ratios, above = [], []
  for turn in range(rounds):
    found = {}
    for name, source in (('read', _READ), ('load', _LOAD))[:: (-1) ** turn]:
      forget(folder)
      found[name] = run(source, folder)
    read, load = found['read']['seconds'], found['load']['seconds']
    ratios.append(load / read)
    above.append(found['load']['above'] / 2**30)
    size = found['load']['size'] / 1e9
    print(
      f'  {size:.2f} GB: read {read:6.1f} s ({size / read:.2f} GB/s), '
      f'load {load:6.1f} s ({size / load:.2f} GB/s): {ratios[-1]:.2f}, '
      f'{above[-1]:.2f} GiB above the parameters',
      flush=True,
    )
  ratio = statistics.median(ratios)
  print(
    f'  median {ratio:.2f} x reading (limit {MAX_RATIO}), '
    f'{max(above):.2f} GiB (limit {MAX_GIB})',
    flush=True,
  )
  return ratio <= MAX_RATIO and max(above) <= MAX_GIB


def run(source: str, folder: pathlib.Path) -> dict:
  """What a process of its own finds."""
  done = subprocess.run(
    [sys.executable, '-c', source, folder],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


if __name__ == '__main__':
  sys.exit(main())
