"""Converts a checkpoint of the release's size, and says what that takes.

  python benchmarks/convert_full_size.py --folder SCRATCH

Makes a synthetic Qwen-VL in the released layout (853 tensors, 19.3 GB in
bfloat16, shards of 2 GB, PyTorch's with --torch; with --int4 the Int4 release's
1,461 tensors, which are kept packed), then measures one after the other, each
with its source out of the page cache and everything synced to disk:

  copy      the shards, as they are: what this disk takes
  from-hf   to an Orbax checkpoint
  to-hf     back again

and compares the round trip with the original, byte for byte. Prints the peak
resident memory of each conversion above that of the interpreter with its
imports, and its time as a multiple of the copy's; exits with status 1 if they
exceed 3 GiB or 2.5. Needs 60 GB of disk (31 with --int4) and leaves nothing
behind.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from qwenvl_jax.conversion import gptq, layout
from qwenvl_jax.conversion.families.qwen_vl.config import config_to_hf
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.conversion.writer import ReleasedWriter
from qwenvl_jax.model.config import DecoderConfig, qwen_vl_7b

MAX_GIB, MAX_RATIO = 3.0, 2.5
NEEDED, NEEDED_INT4 = 60 * 10**9, 31 * 10**9
SHARD = 2 * 10**9

# Run in a process of its own: imports, then a conversion, with the resident
# memory after each.
_CHILD = """
import json, sys, time
from pathlib import Path
from qwenvl_jax.conversion import convert

def status(key):
  for line in open('/proc/self/status'):
    if line.startswith(key):
      return int(line.split()[1]) * 1024

before, start = status('VmRSS'), time.perf_counter()
name, source, target, options = sys.argv[1:]
getattr(convert, name)(Path(source), Path(target), **json.loads(options))
print(json.dumps({
  'before': before,
  # Not getrusage, whose peak is that of the parent if that was larger.
  'peak': status('VmHWM'),
  'seconds': time.perf_counter() - start,
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
    '--layers',
    type=int,
    default=32,
    help='of the decoder; fewer for a quick look (default: the release)',
  )
  kind = parser.add_mutually_exclusive_group()
  kind.add_argument(
    '--torch',
    action='store_true',
    help='start from .bin shards (needs torch, and memory for one)',
  )
  kind.add_argument(
    '--int4',
    action='store_true',
    help="the Int4 release's layout, its weights kept packed",
  )
  args = parser.parse_args()
  free = shutil.disk_usage(args.folder).free
  needed = NEEDED_INT4 if args.int4 else NEEDED
  if args.layers == 32 and free < needed:
    print(
      f'{args.folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are '
      'needed: choose another --folder',
      file=sys.stderr,
    )
    return 2
  # Clean up as after control-C.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
    original = pathlib.Path(scratch, 'original')
    if args.int4:
      size = make_int4(original, args.layers)
    else:
      size = make(original, args.layers, args.torch)
    return measure(pathlib.Path(scratch), size, args.int4)


def measure(scratch: pathlib.Path, size: int, int4: bool) -> int:
  """Converts `original` and compares; prints as it goes."""
  original, ours, back = (scratch / n for n in ('original', 'ours', 'back'))
  print(f'synthetic checkpoint: {size / 1e9:.2f} GB', flush=True)
  forget(original)
  copied = copy(original, scratch / 'copy')
  shutil.rmtree(scratch / 'copy')
  print(f'copy     {copied:7.1f} s  {size / copied / 1e9:.2f} GB/s', flush=True)
  failed = False
  for name, source, target, options in (
    ('from_hf', original, ours, {'keep_int4': int4}),
    ('to_hf', ours, back, {}),
  ):
    forget(source)
    found = convert(name, source, target, options)
    memory = (found['peak'] - found['before']) / 2**30
    ratio = found['seconds'] / copied
    failed |= memory > MAX_GIB or ratio > MAX_RATIO
    print(
      f'{name.replace("_", "-"):8s} {found["seconds"]:7.1f} s  '
      f'{ratio:.2f} x the copy (limit {MAX_RATIO}), '
      f'{memory:.2f} GiB above the interpreter (limit {MAX_GIB})',
      flush=True,
    )
  same = compare(original, back)
  print('round trip: ' + ('bit for bit' if same else 'DIFFERS'), flush=True)
  return int(failed or not same)


def make(folder: pathlib.Path, layers: int, pickled: bool) -> int:
  """Writes the synthetic checkpoint; returns the bytes of its tensors."""
  folder.mkdir()
  config = qwen_vl_7b(decoder=DecoderConfig(layers=layers))
  (folder / 'config.json').write_text(json.dumps(config_to_hf(config)))
  noise = make_noise()
  shards = [[]]
  for name, rule in layout.released_order(layout.rules(config)):
    if sum(2 * math.prod(shape) for _, shape in shards[-1]) > SHARD:
      shards.append([])
    shards[-1].append((name, rule.shape))
  stem, suffix, write = 'model', 'safetensors', write_shard
  if pickled:
    stem, suffix, write = 'pytorch_model', 'bin', write_pickled
  weight_map, total = {}, 0
  for index, shard in enumerate(shards):
    file = f'{stem}-{index + 1:05d}-of-{len(shards):05d}.{suffix}'
    weight_map |= dict.fromkeys((name for name, _ in shard), file)
    total += write(folder / file, shard, noise)
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  (folder / f'{stem}.{suffix}.index.json').write_text(json.dumps(index))
  return total


def make_noise() -> np.ndarray:
  """Finite bfloat16 (and float16) of all sizes, as their bits.

  Every tensor starts elsewhere in it.
  """
  noise = np.random.default_rng(0).integers(0, 2**16, 2**24, np.uint16)
  return noise & np.uint16(0xBFFF)


def make_int4(folder: pathlib.Path, layers: int) -> int:
  """`make` of the Int4 layout, in float16."""
  folder.mkdir()
  config = qwen_vl_7b(decoder=DecoderConfig(layers=layers, int4_group=128))
  (folder / 'config.json').write_text(json.dumps(config_to_hf(config)))
  table, noise, total = layout.rules(config), make_noise(), 0
  implied = dict(gptq.implied(table, 128, np.dtype(np.float16)))
  tensors = [
    (name, rule.shape, np.dtype(np.int32 if words(name) else np.float16))
    for name, rule in layout.released_order(table)
  ]
  everything = [*tensors, *((n, x.shape, x.dtype) for n, x in implied.items())]
  with ReleasedWriter(folder, everything, SHARD) as writer:
    for number, (name, shape, dtype) in enumerate(tensors):
      count = math.prod(shape) * dtype.itemsize // noise.itemsize
      values = np.concatenate(list(parts(noise, number, count)))
      writer.write(name, 0, values)
      total += values.nbytes
    for name, values in implied.items():
      writer.write(name, 0, values)
      total += values.nbytes
  return total


def words(name: str) -> bool:
  return name.endswith(('.qweight', '.qzeros'))


def write_shard(path, tensors, noise) -> int:
  header, end = {}, 0
  for name, shape in tensors:
    begin, end = end, end + 2 * math.prod(shape)
    header[name] = {
      'dtype': 'BF16',
      'shape': shape,
      'data_offsets': [begin, end],
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for number, (_, shape) in enumerate(tensors):
      for part in parts(noise, number, math.prod(shape)):
        file.write(part)
    file.flush()
    os.fsync(file.fileno())
  return end


def write_pickled(path, tensors, noise) -> int:
  import torch

  state, size = {}, 0
  for number, (name, shape) in enumerate(tensors):
    values = np.concatenate(list(parts(noise, number, math.prod(shape))))
    bits = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    state[name] = bits.reshape(shape)
    size += values.nbytes
  with path.open('wb') as file:
    torch.save(state, file)
    file.flush()
    os.fsync(file.fileno())
  return size


def parts(noise, number: int, count: int):
  """Yields pieces of `noise` with `count` values, others for each number."""
  start = number * 7919 % (len(noise) // 2)
  while count:
    part = noise[start : start + count]
    yield part
    count, start = count - len(part), 0


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
  """Seconds that a plain copy takes, synced to disk."""
  start = time.perf_counter()
  target.mkdir()
  for path in sorted(source.iterdir()):
    shutil.copyfile(path, target / path.name)
    with (target / path.name).open('rb') as file:
      os.fsync(file.fileno())
  return time.perf_counter() - start


def convert(
  name: str, source: pathlib.Path, target: pathlib.Path, options: dict
) -> dict:
  """Runs one conversion in a process of its own."""
  done = subprocess.run(
    [sys.executable, '-c', _CHILD, name, source, target, json.dumps(options)],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def forget(folder: pathlib.Path) -> None:
  """Drops a folder's files from the page cache."""
  for path in folder.rglob('*'):
    if path.is_file():
      with path.open('rb') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(first: pathlib.Path, second: pathlib.Path) -> bool:
  """Whether two released folders hold the same tensors, bit for bit."""
  a, b = open_released(first), open_released(second)
  return a.keys() == b.keys() and all(
    a[name].dtype == b[name].dtype
    and a[name].shape == b[name].shape
    and a[name].load().tobytes() == b[name].load().tobytes()
    for name in a
  )


if __name__ == '__main__':
  sys.exit(main())
