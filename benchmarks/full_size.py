"""The full-size engine, and fine-tuning, on whatever accelerator there is.

  python benchmarks/full_size.py [--rows 1 8 32] [--context 1024] [--steps 64]
  python benchmarks/full_size.py --train lora qlora [--batch 1]

Makes the 9.66B parameters in bfloat16 with random values on the device (20 GB),
answers 1, 8 and 32 prompts at a time, each with a picture, and prints tokens a
second, milliseconds a step, and the share of the memory's bandwidth: bytes that
a step must read (the weights that decoding uses, the filled part of the cache)
over its time, beside what copying an array reaches in the same run. Without an
accelerator it says so and ends; `--tiny` runs a small model anywhere.

With `--train` it takes steps of `finetune/lora.gin` and `finetune/qlora.gin`
instead, on rows of 2,048 tokens with one picture of 448 pixels, and prints
seconds, tokens a second, memory (what is kept, what the compiled step needs,
the most that was in use) and MFU: the FLOPs of the model's own arithmetic
(`plan/model_flops.py`) over time and the makers' peak of bfloat16.
"""

import argparse
import dataclasses
import statistics
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax import configuration
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
from qwenvl_jax.plan import jobs
from qwenvl_jax.plan.main import UNREAD
from qwenvl_jax.plan.plan import needed_flops
from qwenvl_jax.plan.topology import GIB
from qwenvl_jax.sharding import make_mesh, put_batch, use_mesh
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.state import abstract_params, create_state
from qwenvl_jax.train.step import compile_step

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
# FLOPs a second of bfloat16, likewise, dense.
_PEAK = {
  'H100': 989e12,
  'H200': 989e12,
  'A100': 312e12,
  'v5 lite': 197e12,
  'v5p': 459e12,
  'v6': 918e12,
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
    '--train',
    nargs='+',
    choices=('lora', 'qlora'),
    default=(),
    help='take steps of training instead',
  )
  parser.add_argument(
    '--batch', type=int, default=1, help='rows of a training step'
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
  for name in args.train:
    measure_training(name, device, args)
  if args.train:
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
  named = of_device(_BANDWIDTH, device)
  print(
    f'copying an array: {copied / 1e9:,.0f} GB/s read and written'
    + (f'; data sheet {named / 1e9:,.0f} GB/s' if named else '')
  )
  for rows in args.rows:
    measure(config, params, rows, named or copied, args)
  return 0


def of_device(figures: dict[str, float], device) -> float | None:
  """What a table says of a device; None if it is not there."""
  return next((v for k, v in figures.items() if k in device.device_kind), None)


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
  return random_values(nn.meta.unbox(shapes))


def random_values(shapes):
  """Arrays of these shapes and dtypes, on one device."""

  @jax.jit(static_argnums=(1, 2))
  def make(key, shape, dtype):
    # By halves, so that little is there beside the values.
    bits = jax.random.bits(key, shape, jnp.uint8)
    return (bits.astype(dtype) / 128 - 1) * 0.03

  def leaf(number, x):
    if x.ndim == 1:
      return jnp.ones(x.shape, x.dtype)
    key = jax.random.key(number)
    if jnp.issubdtype(x.dtype, jnp.integer):
      bits = jax.random.bits(key, x.shape, jnp.uint32)
      return jax.lax.bitcast_convert_type(bits, x.dtype)
    return make(key, x.shape, x.dtype)

  leaves, tree = jax.tree.flatten(shapes)
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


def measure_training(name: str, device, args) -> None:
  """Takes steps of `finetune/NAME.gin` on one device."""
  config = training_config(name, args)
  model = config.objective.config
  mesh = make_mesh(config.mesh, [device])
  job = jobs.make('train', config, [device])
  params = random_values(
    abstract_params(config.objective, config.optimizer, mesh)
  )
  state = create_state(params, config.optimizer, mesh)
  del params
  batch = put_batch(training_batch(config), mesh)
  step = compile_step(
    config.objective, config.optimizer, config.accumulation, mesh, state
  )
  began = time.perf_counter()
  with use_mesh(mesh):
    compiled = step.jitted.lower(state, batch).compile()
  print(f'{name}: compiled in {time.perf_counter() - began:.0f} s')
  seconds = []
  for _ in range(4):
    began = time.perf_counter()
    state, metrics = compiled(state, batch)
    loss = float(metrics['loss'])
    seconds.append(time.perf_counter() - began)
    assert np.isfinite(loss), loss
  took = statistics.median(seconds[1:])
  needed = needed_flops(job)
  peak = of_device(_PEAK, device)
  kept = ', '.join(f'{k} {v / GIB:.2f}' for k, v in job.kept_bytes.items())
  memory = compiled.memory_analysis()
  planned = (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  used = (device.memory_stats() or {}).get('peak_bytes_in_use')
  tokens = config.data.batch_size * config.data.sequence_length
  print(
    f'{name}: {took:.3f} s a step of {config.data.batch_size} x '
    f'{config.data.sequence_length} tokens, {tokens / took:,.0f} tokens/s, '
    f'{needed / took / 1e12:.1f} TFLOP/s of the model'
    + (f', MFU {needed / took / peak:.1%}' if peak else '')
    + f'; remat {model.remat}; GiB: {kept}, the program {planned / GIB:.2f}'
    + (f', most in use {used / GIB:.2f}' if used else ''),
    flush=True,
  )


def training_config(name: str, args) -> TrainConfig:
  given = ['RECORDS=400', 'IMAGE_SLOTS=1', f'BATCH={args.batch}', *UNREAD]
  configuration.load([f'finetune/{name}.gin'], given)
  config = configuration.build(TrainConfig, whole=False)
  if not args.tiny:
    return config
  model = config.objective.config
  small = tiny().replace(lora=model.lora, remat=model.remat)
  if model.decoder.int4_group:
    small = small.replace(
      decoder=dataclasses.replace(small.decoder, int4_group=8)
    )
  return dataclasses.replace(
    config,
    objective=dataclasses.replace(config.objective, config=small),
    data=dataclasses.replace(
      config.data,
      sequence_length=256,
      image_size=small.vision.image_size,
      image_tokens=small.adapter.queries,
    ),
  )


def training_batch(config: TrainConfig) -> dict[str, np.ndarray]:
  """Rows of one picture, then text, all of which is learned."""
  model, data = config.objective.config, config.data
  rows = [prompt(model, data.sequence_length)] * data.batch_size
  tokens = np.stack([x.tokens for x in rows])
  made = dataclasses.replace(
    text_batch(tokens),
    targets=np.roll(tokens, -1, axis=1),
    loss_weights=np.ones(tokens.shape, np.float32),
    pixels=np.stack([x.images for x in rows]),
    image_starts=np.stack([np.int32(x.image_starts) for x in rows]),
  )
  return {x.name: getattr(made, x.name) for x in dataclasses.fields(made)}


if __name__ == '__main__':
  sys.exit(main())
