"""Conversions between checkpoint folders, as functions.

Each reads and writes one block of a few megabytes after the other, in a few
threads: neither side is ever held in memory.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.conversion import folder as folders
from qwenvl_jax.conversion import gptq, layout, openclip, reader
from qwenvl_jax.conversion.atomic import new_folder, new_local_folder
from qwenvl_jax.conversion.blocks import Block, chunk_shapes, plan
from qwenvl_jax.conversion.orbax_store import OrbaxWriter
from qwenvl_jax.conversion.source import (
  ArraySource,
  CastSource,
  GrownSource,
  PartsSource,
  Source,
)
from qwenvl_jax.conversion.writer import DTYPES, ReleasedWriter
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.adapter import Adapter
from qwenvl_jax.model.config import QwenVLConfig

SHARD_BYTES = 2 * 10**9

# Reading, transposing and writing overlap; more threads only cost memory.
_THREADS = 3

# Told how many bytes of how many are done.
Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
  pass


def from_hf(
  source: Path,
  destination: Path,
  dtype: str | None = None,
  progress: Progress = _silent,
  keep_int4: bool = False,
) -> None:
  """Released layout to Orbax.

  Args:
    source: folder with config.json and weights.
    destination: a new folder.
    dtype: to cast to; None keeps the stored dtype (bfloat16 for Int4).
    progress: see `Progress`.
    keep_int4: keep the packed weights of an Int4 checkpoint as they are, for
      inference, and all else in its stored dtype unless `dtype` is given.
      Otherwise they are dequantized.

  Raises:
    CheckpointError: the source is incomplete, damaged or of another model, a
      value does not fit the dtype, or the destination is in use or too small.
  """
  config = folders.read_config(source)
  if not reader.has_released_weights(source):
    raise CheckpointError(
      f'{source} holds no released weights (safetensors or .bin)'
    )
  if keep_int4:
    config = folders.read_config(source, keep_int4)
  values, table = folders.open_source(source, config, _dtype(dtype))
  _require_all_parts(table, source)
  write_ours(values, config, source, destination, progress)


def to_hf(
  source: Path,
  destination: Path,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  progress: Progress = _silent,
) -> None:
  """A checkpoint of ours (or a training run) to the released layout.

  Int4 weights that were kept become the Int4 layout again.

  Args:
    source: see `folder.params_folder`.
    destination: a new folder.
    dtype: of the tensors written; None keeps the stored dtype.
    shard_bytes: upper bound on a shard.
    progress: see `Progress`.

  Raises:
    CheckpointError: the source is no complete checkpoint, a value does not fit
      the dtype, or the destination is in use or too small.
  """
  config = folders.read_config(source)
  values, table = folders.open_source(source, config, _dtype(dtype))
  _require_all_parts(table, source)
  tensors = [
    (name, rule.shape, values.dtypes[rule.paths[0]])
    for name, rule in layout.released_order(table)
  ]
  size = sum(math.prod(s) * np.dtype(d).itemsize for _, s, d in tensors)
  implied, group = {}, config.decoder.int4_group
  if group is not None:
    biases = values.dtypes['decoder/blocks/attn/q/bias']
    implied = dict(gptq.implied(table, group, biases))
  tensors += [(name, x.shape, x.dtype) for name, x in implied.items()]
  with new_local_folder(destination, size) as partial:
    with ReleasedWriter(partial, tensors, shard_bytes) as writer:
      copy(values, plan(table), writer.write, size, progress)
      for name, array in implied.items():
        writer.write_rows(name, 0, array)
    folders.carry_side_files(source, partial, config, _common(values))


def write_ours(
  values: Source,
  config: QwenVLConfig,
  side_files: Path,
  destination: Path,
  progress: Progress = _silent,
  code: bool = True,
) -> None:
  """Writes a whole model as a checkpoint folder of ours.

  Args:
    values: of every parameter.
    config: of the model.
    side_files: folder whose settings and vocabulary go along.
    destination: a new folder.
    progress: see `Progress`.
    code: whether the code in `side_files` is for this model as well.
  """
  table, dtypes = layout.rules(config), values.dtypes
  arrays = {
    path: (shape, dtypes[path])
    for path, shape in layout.parameter_shapes(config).items()
  }
  size = sum(math.prod(s) * d.itemsize for s, d in arrays.values())
  with new_folder(destination, size) as partial:
    writer = OrbaxWriter(partial / 'params', arrays, chunk_shapes(table))
    copy(values, plan(table), writer.write, size, progress)
    folders.carry_side_files(side_files, partial, config, _common(values), code)


def copy(
  values: Source,
  blocks: Iterable[Block],
  write: Callable[[Block, list[np.ndarray]], None],
  size: int,
  progress: Progress = _silent,
) -> None:
  """Copies blocks, a few at a time.

  Args:
    values: read from.
    blocks: what to copy.
    write: takes a block and its values; called from several threads.
    size: bytes in all, for `progress`.
    progress: see `Progress`.
  """

  def one(block):
    boxes = values.read(block)
    write(block, boxes)
    return sum(box.nbytes for box in boxes)

  blocks, running, done = iter(blocks), set(), 0
  pool = ThreadPoolExecutor(_THREADS)
  progress(done, size)
  try:
    while True:
      for block in blocks:
        running.add(pool.submit(one, block))
        if len(running) > _THREADS:
          break
      if not running:
        return
      finished, running = wait(running, return_when=FIRST_COMPLETED)
      done += sum(future.result() for future in finished)
      progress(done, size)
  finally:
    pool.shutdown(cancel_futures=True)


def _dtype(name: str | None) -> np.dtype | None:
  return None if name is None else np.dtype(DTYPES[name])


def _common(values: Source) -> np.dtype:
  """What config.json calls the dtype of a checkpoint."""
  return values.dtypes['decoder/embed']


def _require_all_parts(table: list[layout.Rule], source: Path) -> None:
  found = {layout.part_of(rule.paths[0]) for rule in table}
  missing = [part for part in layout.PARTS if part not in found]
  if missing:
    raise CheckpointError(
      f'{source} has no {" and no ".join(missing)}: it is not a whole Qwen-VL. '
      'qwenvl-convert init-stage1 joins a Qwen-7B with a vision transformer'
    )


@dataclasses.dataclass(frozen=True)
class Stage1:
  """What `init_stage1` made.

  Attributes:
    config: of the model.
    new_rows: rows of the vocabulary that the decoder's folder has not.
  """

  config: QwenVLConfig
  new_rows: int


def init_stage1(
  vision: Path,
  decoder: Path,
  destination: Path,
  seed: int = 0,
  dtype: str | None = None,
  progress: Progress = _silent,
) -> Stage1:
  """Stage 1's start: OpenCLIP's vision, Qwen-7B's decoder, a new adapter.

  Args:
    vision: folder with open_clip_config.json and the weights.
    decoder: folder in the released layout, with or without `visual`. If its
      vocabulary ends before `</img>` and `<imgpad>`, new rows are drawn as a
      decoder's first ones are, for the embedding and for the head.
    destination: a new folder.
    seed: of all new parameters.
    dtype: of all parameters; None keeps what is stored, and float32 for the
      adapter.
    progress: see `Progress`.

  Raises:
    CheckpointError: tensors do not match the configs; see `from_hf`.
  """
  stored, kind = folders.read_config(decoder), _dtype(dtype)
  if stored.decoder.int4_group is not None:
    raise CheckpointError(
      f'{decoder} keeps int4 weights, which cannot be trained: take what they '
      'were converted from, which is then dequantized'
    )
  vocabulary = vocabulary_size(stored)
  config = stored.replace(
    vision=openclip.read_config(vision),
    decoder=dataclasses.replace(stored.decoder, vocab_size=vocabulary),
  )
  language, table = folders.open_source(decoder, stored, kind)
  if not any(layout.part_of(rule.paths[0]) == 'decoder' for rule in table):
    raise CheckpointError(f'{decoder} has no decoder: expected a Qwen-7B')
  sight, _ = folders.open_source(vision, config, kind)
  adapter = ArraySource(_random_adapter(config, seed))
  if kind is not None:
    adapter = CastSource(adapter, kind, 'the new adapter')
  rows = stored.decoder.vocab_size
  parts = {
    'vision': sight,
    'decoder': GrownSource(language, rows, seed),
    'adapter': adapter,
  }
  values = PartsSource(parts)
  # A Qwen-7B's own code knows no pictures.
  write_ours(values, config, decoder, destination, progress, code=False)
  return Stage1(config, vocabulary - rows)


def vocabulary_size(config: QwenVLConfig) -> int:
  """Rows that a vocabulary with image tokens needs.

  Returns:
    The decoder's own size if `<img>`, `</img>` and `<imgpad>` fit, else the
    next multiple of 128, as released (151936).
  """
  needed = config.image_start_id + 3
  size = config.decoder.vocab_size
  return size if size >= needed else -(-needed // 128) * 128


def _random_adapter(config: QwenVLConfig, seed: int) -> dict:
  """{'adapter': a new one in float32}."""
  patch = jnp.zeros((1, 1, config.vision.width))

  def init(key):
    variables = Adapter(config.adapter).init(key, patch, (1, 1))
    return {'adapter': nn.meta.unbox(variables['params'])}

  return jax.jit(init)(jax.random.key(seed))
