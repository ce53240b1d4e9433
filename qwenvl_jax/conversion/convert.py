"""Conversions between checkpoint folders, as functions.

`job.Conversion` says what their arguments mean; `progress` is a `Progress`, and
`saved` the config file that made the conversion, to be written beside it.
Each reads and writes one block of a few megabytes after the other, in a few
threads: neither side is ever held in memory.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.conversion import checkpoint_io, finite, gptq, layout, reader
from qwenvl_jax.conversion.atomic import new_folder, new_local_folder
from qwenvl_jax.conversion.blocks import Block, chunk_shapes, in_threads, plan
from qwenvl_jax.conversion.families import openclip
from qwenvl_jax.conversion.families.names import RELEASED, TensorNames
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.orbax_store import OrbaxWriter
from qwenvl_jax.conversion.rules import Rule, nbytes
from qwenvl_jax.conversion.tensors import DTYPES, Tensor, cast_all
from qwenvl_jax.conversion.writer import ReleasedWriter
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


@dataclasses.dataclass(frozen=True)
class Converted:
  """What a conversion made.

  Attributes:
    config: of the model.
    notes: what to say of it, a line each.
    new_rows: rows of the vocabulary that the source has not.
  """

  config: QwenVLConfig
  notes: tuple[str, ...]
  new_rows: int = 0


def from_hf(
  source: Path,
  destination: Path,
  dtype: str | None = None,
  progress: Progress = _silent,
  keep_int4: bool = False,
  names: TensorNames = RELEASED,
  vocab_size: int | None = None,
  seed: int = 0,
  saved: str | None = None,
) -> Converted:
  """Converts the released layout to Orbax.

  Int4 weights are dequantized (to bfloat16 unless `dtype` is given), or kept
  packed with `keep_int4`; `dtype` is then of all others.

  Raises:
    CheckpointError: the source is incomplete, damaged or of another model, a
      value does not fit the dtype, or the destination is in use or too small.
    DataError: the vocabulary is damaged.
  """
  config = checkpoint_io.read_config(source)
  if not reader.has_released_weights(source):
    raise CheckpointError(
      f'{source} holds no released weights (safetensors or .bin)'
    )
  if keep_int4:
    config = checkpoint_io.read_config(source, keep_int4, names)
  assets.read_tokenizer(source, config)
  notes = []
  tensors, table = checkpoint_io.open_tensors(
    source, config, dtype_of(dtype), names, notes
  )
  _require_all_parts(table, source)
  config, tensors, new = _grown(config, tensors, vocab_size, seed, source)
  checkpoint_io.check_image_ids(config, str(source))
  notes += write_ours(
    tensors, config, source, destination, progress, saved=saved
  )
  return Converted(config, tuple(notes), new)


def to_hf(
  source: Path,
  destination: Path,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  progress: Progress = _silent,
  saved: str | None = None,
) -> Converted:
  """Converts a checkpoint of ours (or a training run) to the released layout.

  Int4 weights that were kept become the Int4 layout again.

  Raises:
    CheckpointError: the source is no complete checkpoint, a value does not fit
      the dtype, or the destination is in use or too small.
    DataError: the vocabulary is damaged.
  """
  config = checkpoint_io.read_config(source)
  notes = []
  tensors, table = checkpoint_io.open_tensors(
    source, config, dtype_of(dtype), notes=notes
  )
  _require_all_parts(table, source)
  assets.read_tokenizer(source, config)
  stored = [
    (name, rule.shape, tensors[name].dtype)
    for name, rule in layout.released_order(table)
  ]
  size = sum(nbytes(s, d) for _, s, d in stored)
  implied, group = {}, config.decoder.int4_group
  if group is not None:
    biases = tensors['transformer.h.0.attn.c_attn.bias'].dtype
    implied = dict(gptq.implied(table, group, biases))
  stored += [(name, x.shape, x.dtype) for name, x in implied.items()]
  with new_local_folder(destination, size) as partial:
    with ReleasedWriter(partial, stored, shard_bytes) as writer:

      def write(block: Block, rows: np.ndarray):
        writer.write(block.name, block.start, rows)

      counts = copy(tensors, plan(table), write, progress)
      for name, array in implied.items():
        writer.write(name, 0, array)
    notes += _write_assets(counts, tensors, source, partial, config, saved)
  return Converted(config, tuple(notes))


def write_ours(
  tensors: Mapping[str, Tensor],
  config: QwenVLConfig,
  source: Path,
  destination: Path,
  progress: Progress = _silent,
  code: bool = True,
  saved: str | None = None,
) -> list[str]:
  """Writes a whole model as a checkpoint folder of ours.

  Args:
    tensors: of the model, by their released names.
    config: of the model.
    source: folder whose settings and vocabulary go along.
    destination: a new folder.
    progress: see `Progress`.
    code: whether the code in `source` is for this model as well.
    saved: config file that made the conversion.

  Returns:
    What to say of it, a line each.
  """
  table = layout.rules(config)
  shapes = layout.released_shapes(table)
  size = sum(nbytes(x, tensors[name].dtype) for name, x in shapes.items())
  blocks = list(plan(table))
  with new_folder(destination, size) as partial:
    chunks = chunk_shapes(blocks)
    writer = OrbaxWriter(partial / 'params', tensors, table, chunks)
    counts = copy(tensors, blocks, writer.write, progress)
    return _write_assets(counts, tensors, source, partial, config, saved, code)


def _write_assets(
  counts, tensors, source, partial, config, saved, code=True
) -> list[str]:
  """Writes what is beside the weights; returns what to say."""
  # As config.json calls the model's.
  dtype = tensors['transformer.wte.weight'].dtype
  if saved is not None:
    assets.write_conversion(partial, saved)
  notes = assets.carry_assets(source, partial, config, dtype, code)
  return [*filter(None, [finite.describe(counts)]), *notes]


def copy(
  tensors: Mapping[str, Tensor],
  blocks: Iterable[Block],
  write: Callable[[Block, np.ndarray], None],
  progress: Progress = _silent,
) -> collections.Counter:
  """Copies blocks, a few at a time.

  Args:
    tensors: read from, by their released names.
    blocks: what to copy.
    write: takes a block and its rows; called from several threads.
    progress: see `Progress`.

  Returns:
    How many values of each parameter are not finite.
  """
  counts = collections.Counter()

  def one(block):
    rows = tensors[block.name].read(block.start, block.stop)
    write(block, rows)
    return block, finite.count_not_finite(rows), rows.nbytes

  blocks = list(blocks)
  size = sum(x.values * tensors[x.name].dtype.itemsize for x in blocks)
  done = 0
  progress(done, size)
  # Closed: whoever clears away what was begun must not meet a thread there.
  with contextlib.closing(in_threads(one, blocks, _THREADS)) as finished:
    for block, not_finite, written in finished:
      counts[' or '.join(block.paths)] += not_finite
      done += written
      progress(done, size)
  return counts


def dtype_of(name: str | None) -> np.dtype | None:
  """Gives the dtype of a name, None of None.

  Raises:
    CheckpointError: nothing is converted to it.
  """
  if name is not None and name not in DTYPES:
    raise CheckpointError(
      f'dtype {name!r} is none of {", ".join(DTYPES)}, which are converted to'
    )
  return None if name is None else np.dtype(DTYPES[name])


def _require_all_parts(table: list[Rule], source: Path) -> None:
  found = {layout.part_of(rule.paths[0]) for rule in table}
  missing = [part for part in layout.PARTS if part not in found]
  if missing:
    raise CheckpointError(
      f'{source} has no {" and no ".join(missing)}: it is not a whole Qwen-VL. '
      'qwenvl-convert init-stage1 joins a Qwen-7B with a vision transformer'
    )


# One row a token.
_VOCABULARY = ('transformer.wte.weight', 'lm_head.weight')


def _grown(
  config: QwenVLConfig,
  tensors: dict[str, Tensor],
  vocab_size: int | None,
  seed: int,
  source: Path,
) -> tuple[QwenVLConfig, dict[str, Tensor], int]:
  """Adds rows to the vocabulary; returns how many, too."""
  rows = config.decoder.vocab_size
  if vocab_size in (None, rows):
    return config, tensors, 0
  if vocab_size < rows:
    raise CheckpointError(
      f'{source} has {rows:,} rows in its vocabulary, more than vocab_size='
      f'{vocab_size:,}: rows are added, not removed'
    )
  decoder = dataclasses.replace(config.decoder, vocab_size=vocab_size)
  grown = {
    name: tensors[name].grown(vocab_size, (seed, index))
    for index, name in enumerate(_VOCABULARY)
  }
  return config.replace(decoder=decoder), tensors | grown, vocab_size - rows


def init_stage1(
  vision: Path,
  decoder: Path,
  destination: Path,
  seed: int = 0,
  dtype: str | None = None,
  progress: Progress = _silent,
  names: TensorNames = RELEASED,
  vocab_size: int | None = None,
  saved: str | None = None,
) -> Converted:
  """Makes stage 1's start: OpenCLIP's vision, Qwen-7B's decoder, a new adapter.

  Args:
    vision: folder with open_clip_config.json and the weights.
    decoder: folder in the released layout, with or without `visual`. If its
      vocabulary ends before `</img>` and `<imgpad>`, new rows are drawn as a
      decoder's first ones are, for the embedding and for the head.
    destination, seed, names: see `job.Conversion`.
    dtype: of all parameters; None keeps what is stored, and float32 for the
      adapter.
    progress: see `Progress`.
    vocab_size: rows of the vocabulary; None for `vocabulary_size`.
    saved: config file that made the conversion.

  Raises:
    CheckpointError: tensors do not match the configs; see `from_hf`.
    DataError: the vocabulary is damaged.
  """
  stored, kind = checkpoint_io.read_config(decoder), dtype_of(dtype)
  if stored.decoder.int4_group is not None:
    raise CheckpointError(
      f'{decoder} keeps int4 weights, which cannot be trained: take what they '
      'were converted from, which is then dequantized'
    )
  assets.read_tokenizer(decoder, stored)
  notes, sizes = [], openclip.read_config(vision)
  language, table = checkpoint_io.open_tensors(
    decoder, stored, kind, names, notes
  )
  if not any(layout.part_of(rule.paths[0]) == 'decoder' for rule in table):
    raise CheckpointError(f'{decoder} has no decoder: expected a Qwen-7B')
  config, language, new = _grown(
    stored.replace(vision=sizes),
    language,
    vocab_size or vocabulary_size(stored),
    seed,
    decoder,
  )
  sight, _ = checkpoint_io.open_tensors(vision, config, kind)
  adapter = _random_adapter(config, seed)
  if kind is not None:
    adapter = cast_all(adapter, kind)
  # The decoder's may be a whole model.
  tensors = language | sight | adapter
  # A Qwen-7B's own code knows no pictures.
  notes += write_ours(
    tensors, config, decoder, destination, progress, code=False, saved=saved
  )
  return Converted(config, tuple(notes), new)


def vocabulary_size(config: QwenVLConfig) -> int:
  """Finds how many rows a vocabulary with image tokens needs.

  Returns:
    The decoder's own size if `<img>`, `</img>` and `<imgpad>` fit, else the
    next multiple of 128, as released (151936).
  """
  needed = config.image_start_id + 3
  size = config.decoder.vocab_size
  return size if size >= needed else -(-needed // 128) * 128


def _random_adapter(config: QwenVLConfig, seed: int) -> dict[str, Tensor]:
  """The tensors of a new adapter in float32."""
  patch = jnp.zeros((1, 1, config.vision.width))

  def init(key):
    variables = Adapter(config.adapter).init(key, patch, (1, 1))
    return {'adapter': nn.meta.unbox(variables['params'])}

  params = dict(layout.flatten(jax.jit(init)(jax.random.key(seed))))
  released = {
    rule.tensor: rule.to_released(*(np.asarray(params[x]) for x in rule.paths))
    for rule in layout.rules(config, ['adapter'])
  }
  where = Path('the new adapter')
  return {name: Tensor.of(x, where) for name, x in released.items()}
