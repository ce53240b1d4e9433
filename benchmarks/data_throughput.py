"""Images and tokens a second on one core, against the obvious torch pipeline.

  python benchmarks/data_throughput.py --torch_python TORCH_VENV/bin/python

End to end: decode JPEG, resize to the stage's square, normalize, encode text,
pack. Both get the same samples of the mixture with photographs of web size,
alternate in short rounds on one core, and the ratio of CPU seconds
an image is printed for every round. Normalization is part of it on torch's
side; here pixels stay uint8 and the device normalizes, as in training. Checked
in the same run: the same ids, and pixels equal within 1/255.

--torch_python names a Python with torch, torchvision, tiktoken, numpy and
pillow (`pip install torch torchvision tiktoken`); it need not have jax.
--memory instead streams rows of a 10-million-record index and prints how much
memory they take.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import synthetic
import tiktoken

from qwenvl_jax import configuration, image
from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data.packing import Packer
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.text import bpe
from qwenvl_jax.text.tokenizer import Tokenizer

# TPU v5e: FLOP/s of a chip, the share of it that training reaches, chips of a
# host. They decide how many rows a host must be fed; see `_needed`.
_PEAK, _SHARE, _CHIPS_A_HOST = 197e12, 0.45, 4
_VISION, _DECODER, _PATCH = 1.9e9, 7.7e9, 14


def stage(config: str) -> Pipeline:
  """A stage's pipeline on synthetic records with photographs."""
  configuration.load([config], ["MISSING='allow'"])
  made = configuration.build(Pipeline, whole=False)
  pictures = synthetic.photographs()
  streams = [
    dataclasses.replace(
      x, source=synthetic.Synthetic(x.source.name, pictures=pictures)
    )
    for x in made.streams
  ]
  # One shard: as much is read ahead as one torch batch holds.
  packer = made.packer and dataclasses.replace(made.packer, shards=1, pool=16)
  return dataclasses.replace(
    made, streams=streams, packer=packer, prefetch=0, batch_size=1
  )


def torch_samples(made: Pipeline, count: int):
  """Samples of the mixture as (pictures, prompt, answer)."""
  rng = random.Random(0)
  weights = [x.weight for x in made.streams]
  samples = []
  while len(samples) < count:
    (stream,) = rng.choices(made.streams, weights)
    record = stream.source[rng.randrange(len(stream.source))]
    for sample in stream.tasks(record, rng, None):
      pieces = [*sample.prefix, *(p for c in sample.continuations for p in c)]
      prompt = ''.join(p.text for p in pieces if not p.loss)
      answer = ''.join(p.text for p in pieces if p.loss)
      samples.append((sample.images, prompt, answer))
  return samples


def measure(rows, count: int) -> dict[str, float]:
  """CPU seconds of so many rows, and what they hold."""
  images = tokens = 0
  began, cpu = time.perf_counter(), time.process_time()
  for row, _ in itertools.islice(rows, count):
    images += int((row['image_starts'] != NO_IMAGE).sum())
    tokens += int((row['segment_ids'] > 0).sum())
  return {
    'seconds': time.perf_counter() - began,
    'cpu': time.process_time() - cpu,
    'images': images,
    'tokens': tokens,
  }


def run_torch(python, settings, folder) -> dict:
  file = pathlib.Path(folder) / 'settings.pickle'
  file.write_bytes(pickle.dumps(settings))
  script = pathlib.Path(__file__).with_name('torch_pipeline.py')
  done = subprocess.run(
    [python, str(script), str(file)], capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(f'{python} cannot run torch_pipeline.py:\n{done.stderr[-800:]}')
  return json.loads(done.stdout.splitlines()[-1])


def check(made, samples, count, file) -> str:
  """Compares ids and pixels of the first samples with torch's."""
  theirs, worst = np.load(file), 0.0
  text = Tokenizer()
  for number, (pictures, prompt, answer) in enumerate(samples[:count]):
    ids = [
      x
      for part in (prompt, answer)
      for x in text.encode(part, made.image_tokens)
    ]
    if ids != theirs[f'ids{number}'].tolist():
      sys.exit(f'sample {number}: other ids than the released algorithm')
    if pictures:
      ours = image.pixels(pictures[0], made.image_size) / 255
      worst = max(worst, np.abs(ours - theirs[f'pixels{number}']).max())
  if worst > 1 / 255:
    sys.exit(f'pixels differ by {worst:.4f}')
  return f'{count} samples: ids equal, pixels within {worst * 255:.3f}/255'


def compare(arguments) -> None:
  made = stage(arguments.config)
  vocabulary = str(bpe.default_path())
  samples = torch_samples(made, arguments.samples)
  settings = {
    'vocabulary': vocabulary,
    'image_tokens': made.image_tokens,
    'image_size': made.image_size,
    'sequence_length': made.sequence_length,
    'image_slots': made.image_slots,
    'batch': 32 if made.packer else 8,
    'samples': samples,
  }
  rows = made.rows()
  next(rows)
  ratios, ours_all, token_ratios = [], [], []
  with tempfile.TemporaryDirectory() as folder:
    out = f'{folder}/check.npz'
    for number in range(arguments.rounds):
      check_some = {'check': 16, 'out': out} if not number else {}
      theirs = run_torch(arguments.torch_python, settings | check_some, folder)
      if not number:
        print(check(made, samples, 16, out))
        print('torch, torchvision', *theirs['versions'])
      ours = measure(rows, arguments.rows)
      an_image = [x['cpu'] / x['images'] for x in (theirs, ours)]
      a_token = [x['cpu'] / x['tokens'] for x in (theirs, ours)]
      ratios.append(an_image[0] / an_image[1])
      token_ratios.append(a_token[0] / a_token[1])
      ours_all.append(ours)
      print(
        f'round {number + 1}: torch {1 / an_image[0]:.1f} images/s '
        f'{1 / a_token[0]:,.0f} tokens/s, here {1 / an_image[1]:.1f} images/s '
        f'{1 / a_token[1]:,.0f} tokens/s a core: {ratios[-1]:.2f} times '
        f'the images, {token_ratios[-1]:.2f} times the tokens',
        flush=True,
      )
  print(
    f'{arguments.config}: {statistics.median(ratios):.2f} times the images a '
    f'core ({min(ratios):.2f} to {max(ratios):.2f}), '
    f'{statistics.median(token_ratios):.2f} times the tokens'
  )
  cpu, images = (sum(x[key] for x in ours_all) for key in ('cpu', 'images'))
  rows = arguments.rows * len(ours_all)
  _needed(made, arguments.config, cpu, images, rows)


def _needed(made, config, cpu, images, rows) -> None:
  """Cores that a v5e host needs so that its chips never wait."""
  patches = (made.image_size // _PATCH) ** 2
  # 6 FLOPs a parameter and token where it is trained, 4 where it is frozen but
  # passed through; the decoder sees every position, the vision tower each slot.
  frozen_decoder = 'stage1' in config
  flops = (4 if frozen_decoder else 6) * _DECODER * made.sequence_length
  flops += 6 * _VISION * patches * made.image_slots
  rows_a_second = _PEAK * _SHARE * _CHIPS_A_HOST / flops
  cores = rows_a_second * cpu / rows
  print(
    f'a v5e host ({_CHIPS_A_HOST} chips, {_SHARE:.0%} of peak) takes '
    f'{rows_a_second:.2f} rows/s of {made.sequence_length} tokens, '
    f'{images / rows * rows_a_second:.1f} images/s: {cores:.1f} cores like '
    'this one'
  )


def memory(arguments) -> None:
  """Rows from all over an index of 10 million records."""
  made = dataclasses.replace(stage(arguments.config), image_size=112)
  made = dataclasses.replace(made, packer=Packer(shards=4, pool=16))
  print(
    f'{len(made.streams)} sources of {len(made.streams[0].source):,} records'
  )
  rows = made.rows()
  for number in range(8):
    found = measure(rows, arguments.rows * 4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    current = _resident()
    print(
      f'{(number + 1) * arguments.rows * 4} rows, {found["images"]} images '
      f'more: {current:.0f} MB now, {peak:.0f} MB at most',
      flush=True,
    )


def _resident() -> float:
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', default='stage2.gin')
  parser.add_argument('--torch_python', default=sys.executable)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--rows', type=int, default=24, help='of ours a round')
  parser.add_argument('--samples', type=int, default=96, help="torch's a round")
  parser.add_argument('--core', type=int, help='to run on; default: any')
  parser.add_argument('--memory', action='store_true')
  arguments = parser.parse_args()
  core = arguments.core
  if core is None:
    core = max(os.sched_getaffinity(0))
  os.sched_setaffinity(0, {core})
  print(f'core {core}; tiktoken {tiktoken.__version__}')
  (memory if arguments.memory else compare)(arguments)


if __name__ == '__main__':
  main()
