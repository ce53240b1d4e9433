"""The full-size engine on whatever accelerator there is.

  python benchmarks/full_size.py [--rows 1 8 32] [--context 1024] [--steps 64]

Makes the 9.66B parameters in bfloat16 with random values on the device (20 GB),
answers 1, 8 and 32 prompts at a time, each with a picture, and prints tokens a
second, milliseconds a step, and the share of the memory's bandwidth: bytes that
a step must read (the weights that decoding uses, the filled part of the cache)
over its time, beside what copying an array reaches in the same run. Without an
accelerator it says so and ends; `--tiny` runs a small model anywhere.
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.batch import text_batch
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.infer.image_bank import ImageBank
from qwenvl_jax.infer.reading import Reading
from qwenvl_jax.infer.request import Request
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
  qwen_vl_7b,
)
from qwenvl_jax.model.qwen_vl import QwenVL

# Bytes a second of the memory, by what a device's kind contains, from the
# makers' data sheets.
_BANDWIDTH = {
  'H100': 3.35e12,
  'H200': 4.8e12,
  'A100': 2.04e12,
  'v5 lite': 819e9,
  'v5p': 2765e9,
  'v6': 1640e9,
}


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rows', type=int, nargs='+', default=[1, 8, 32])
  parser.add_argument(
    '--context',
    type=int,
    default=1024,
    help='tokens of a prompt, one picture among them (default: %(default)s)',
  )
  parser.add_argument(
    '--steps', type=int, default=64, help='tokens of an answer that are timed'
  )
  parser.add_argument(
    '--cache', choices=('bfloat16', 'int8'), default='bfloat16'
  )
  parser.add_argument(
    '--tiny', action='store_true', help='a small model, to try the script'
  )
  args = parser.parse_args()
  device = jax.devices()[0]
  print(f'{device.device_kind}, jax {jax.__version__}', flush=True)
  if device.platform == 'cpu' and not args.tiny:
    print('no accelerator here: nothing measured')
    return 0
  config = tiny() if args.tiny else qwen_vl_7b(param_dtype='bfloat16')
  config = config.replace(remat='none', scan_layers=False)
  began = time.perf_counter()
  params = jax.block_until_ready(random_params(config))
  count = sum(x.size for x in jax.tree.leaves(params))
  print(
    f'{count / 1e9:.2f}B parameters made in {time.perf_counter() - began:.0f} s'
  )
  copied = copy_bandwidth(device)
  named = [v for k, v in _BANDWIDTH.items() if k in device.device_kind]
  print(
    f'copying an array: {copied / 1e9:,.0f} GB/s read and written'
    + (f'; data sheet {named[0] / 1e9:,.0f} GB/s' if named else '')
  )
  limit = named[0] if named else copied
  for rows in args.rows:
    measure(config, params, rows, limit, args)
  return 0


def tiny() -> QwenVLConfig:
  return QwenVLConfig(
    VisionConfig(112, width=64, layers=2, heads=2, mlp_dim=128),
    AdapterConfig(queries=64, dim=128, heads=2),
    DecoderConfig(2048, 128, 2, 4, 32, 344),
    image_start_id=1000,
    dtype='float32',
  )


def random_params(config: QwenVLConfig):
  """Parameters of the size that matters; the values give finite logits."""
  shapes = jax.eval_shape(
    QwenVL(config).init, jax.random.key(0), text_batch([[0]])
  )['params']

  @jax.jit(static_argnums=(1, 2))
  def make(key, shape, dtype):
    # By halves, so that little is there beside the values.
    bits = jax.random.bits(key, shape, jnp.uint8)
    return (bits.astype(dtype) / 128 - 1) * 0.03

  def leaf(number, x):
    x = getattr(x, 'value', x)
    if x.ndim == 1:
      return jnp.ones(x.shape, x.dtype)
    return make(jax.random.key(number), x.shape, x.dtype)

  leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: hasattr(x, 'names'))
  return jax.tree.unflatten(
    tree, [leaf(number, x) for number, x in enumerate(leaves)]
  )


def copy_bandwidth(device) -> float:
  """Bytes a second, read and written, of copying a large array."""
  size = 2**24 if device.platform == 'cpu' else 2**30
  x = jnp.zeros(size, jnp.int32)
  flip = jax.jit(lambda x: ~x)
  jax.block_until_ready(flip(x))
  seconds = []
  for _ in range(5):
    began = time.perf_counter()
    jax.block_until_ready(flip(x))
    seconds.append(time.perf_counter() - began)
  return 2 * x.nbytes / min(seconds)


def measure(config, params, rows: int, limit: float, args) -> None:
  cache_dtype = 'int8' if args.cache == 'int8' else None
  engine = Engine(
    config,
    params,
    EngineConfig(
      slots=rows,
      max_len=args.context + 2 * args.steps,
      chunk=args.context // 128 * 128,
      cache_dtype=cache_dtype,
    ),
  )
  request = prompt(config, args.context)
  bank, state = ImageBank(engine), engine.init_state()
  seconds = []
  for slot in range(rows):
    began = time.perf_counter()
    reading = Reading(engine, bank, [request])
    while not reading.finished:
      reading.step()
    jax.block_until_ready(reading.prefix)
    seconds.append(time.perf_counter() - began)
    state = engine.insert(state, reading.prefix, [slot], [request.sampling])
    reading.release()

  def steps(state, count):
    for _ in range(count):
      state, chosen = engine.choose(state)
      state = engine.forward(state)
      chosen = jax.device_get(chosen)
    assert chosen.valid.all()
    return jax.block_until_ready(state)

  state = steps(state, args.steps)
  times = []
  state_steps = min(args.steps // 4, 16)
  for _ in range(4):
    began = time.perf_counter()
    state = steps(state, state_steps)
    times.append((time.perf_counter() - began) / state_steps)
  step = statistics.median(times)
  filled = args.context + args.steps + 2 * state_steps
  read = bytes_read(config, params, state, rows, filled)
  print(
    f'{rows:3d} rows: {rows / step:7.1f} tokens/s, {1e3 * step:6.2f} ms a '
    f'step, {read / 1e9:.1f} GB to read, {read / step / limit:.0%} of the '
    f'bandwidth; a prompt of {args.context} tokens '
    f'{1e3 * min(seconds[1:] or seconds):.0f} ms',
    flush=True,
  )


def prompt(config: QwenVLConfig, length: int) -> Request:
  """One picture, then text."""
  numbers = np.random.default_rng(0)
  queries, start = config.adapter.queries, config.image_start_id
  text = numbers.integers(0, min(start, 1000), length - queries - 2)
  side = config.vision.image_size
  return Request.create(
    config,
    [start, *([0] * queries), start + 1, *text],
    numbers.integers(0, 256, (1, side, side, 3), np.uint8),
    max_new_tokens=1,
  )


def bytes_read(config, params, state, rows: int, filled: int) -> float:
  """Of a step: the decoder but for its table, and the cache's tokens."""
  decoder = dict(params['decoder'])
  table = decoder.pop('embed')
  weights = sum(x.nbytes for x in jax.tree.leaves(decoder))
  weights += rows * table.nbytes / table.shape[0]
  slots = sum(x.nbytes for x in jax.tree.leaves(state.cache.layers))
  return weights + slots * filled / state.cache.size


if __name__ == '__main__':
  sys.exit(main())
