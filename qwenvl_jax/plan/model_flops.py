"""How many FLOPs a step needs by the model's own arithmetic.

Model FLOPs over time and peak is the model FLOPs utilization (MFU): what a
program computes again, or could have done without, does not count.
"""

import dataclasses
import math
from collections.abc import Mapping

from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.lora import FACTORS


@dataclasses.dataclass(frozen=True)
class Work:
  """What one step works on.

  Attributes:
    rows: rows of the global batch.
    length: tokens of a row that are processed.
    images: images of a row that are encoded.
    image_size: side of the images in pixels.
    keys: tokens that each token attends to if these are in a cache; None if
      they are the row's own, causally.
    logits: positions of a row whose logits are computed; None for all.
  """

  rows: int
  length: int
  images: int
  image_size: int
  keys: int | None = None
  logits: int | None = None


def work_of(data: Pipeline) -> Work:
  """A step on a whole batch of a pipeline."""
  return Work(
    data.batch_size, data.sequence_length, data.image_slots, data.image_size
  )


def model_flops(
  config: QwenVLConfig,
  shapes: Mapping[str, tuple[int, ...]],
  trained: frozenset[str],
  work: Work,
) -> float:
  """FLOPs of a step, all chips together.

  The convention. A matrix product with a parameter takes, for each parameter
  and each position (token, patch or query) that it is applied to,

    2 FLOPs forward,
    2 more if the parameter is trained (its gradient),
    2 more if anything trained lies before it (its input's gradient):

  6 where all is trained, 4 where gradients only flow through (the decoder of
  stage 1), 2 where there is no backward pass (the vision transformer of stage
  3, inference). Attention takes 4 FLOPs for each pair of positions, head and
  channel, and twice that again backward where gradients flow; of a causal row
  only half of the pairs count. Not counted: embedding look-ups, norms, biases,
  activation functions, resizing, the optimizer. Every slot of a row counts, as
  token or as image: padding is work like any other.

  Raises:
    ConfigError: a matrix that this function does not know.
  """
  patches = (work.image_size // config.vision.patch_size) ** 2
  positions = {
    'vision': work.images * patches,
    'adapter/patches': work.images * patches,
    'adapter/queries': work.images * config.adapter.queries,
    'decoder': work.length,
    'head': work.length if work.logits is None else work.logits,
  }
  # No gradient comes from images that are not there.
  if not work.images:
    trained = frozenset(p for p in trained if p.startswith('decoder/'))
  total = 0.0
  for path, shape in shapes.items():
    place = _place(path)
    if place:
      factor = 2 + 2 * (path in trained) + 2 * _flows(path, trained)
      total += factor * math.prod(shape) * positions[place]
  total += _attention(config, trained, work, patches)
  return total * work.rows


def _place(path: str) -> str | None:
  """Which positions a parameter is multiplied with; None for no matrix."""
  part, *inner = path.split('/')
  if inner[-1] not in ('kernel', *FACTORS) and path != 'adapter/proj':
    return None
  if part == 'decoder':
    return 'head' if inner[0] == 'lm_head' else 'decoder'
  if part == 'adapter':
    on_patches = inner[0] in ('kv_proj', 'k', 'v')
    return 'adapter/patches' if on_patches else 'adapter/queries'
  if part == 'vision':
    return 'vision'
  raise ConfigError(f'{path}: no convention for the FLOPs of this parameter')


def _flows(path: str, trained: frozenset[str]) -> bool:
  """Whether something trained lies before a parameter."""
  parts = ('vision/', 'adapter/', 'decoder/')
  before = parts[: parts.index(path.split('/')[0] + '/') + 1]
  if path == 'vision/patch_embed/kernel':
    before = ()
  elif path == 'adapter/kv_proj/kernel':
    before = ('vision/',)
  return any(other.startswith(before) for other in trained) if before else False


def _attention(config, trained, work, patches) -> float:
  """FLOPs of a row's attention, forward and backward."""
  vision, adapter, decoder = config.vision, config.adapter, config.decoder
  seen = patches * patches
  if vision.window is not None:
    share = 1 / vision.global_every
    seen = share * seen + (1 - share) * patches * vision.window**2
  keys = work.length / 2 if work.keys is None else work.keys
  pairs = {
    'vision/': work.images * vision.layers * vision.width * seen,
    'adapter/': work.images * adapter.dim * adapter.queries * patches,
    'decoder/': (
      decoder.layers * decoder.heads * decoder.head_dim * work.length * keys
    ),
  }
  total, before = 0.0, ()
  for part, count in pairs.items():
    before = (*before, part)
    flows = any(path.startswith(before) for path in trained)
    total += 4 * count * (3 if flows else 1)
  return total
