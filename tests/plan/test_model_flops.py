import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.batch import Batch
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)
from qwenvl_jax.plan import flops, hlo
from qwenvl_jax.plan.model_flops import Work, model_flops
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import flatten, merge, unflatten

CONFIG = QwenVLConfig(
  vision=VisionConfig(
    image_size=56, patch_size=14, width=32, layers=3, heads=2, mlp_dim=64,
    position_grid=4,
  ),
  adapter=AdapterConfig(queries=4, dim=64, heads=4),
  decoder=DecoderConfig(
    vocab_size=50, dim=64, layers=2, heads=4, head_dim=16, mlp_dim=96,
  ),
  image_start_id=40,
  dtype='float32',
  remat='none',
)  # fmt: skip
# Rows of 24 tokens with 2 images of 16 patches, that become 4 queries each.
WORK = Work(rows=3, length=24, images=2, image_size=56)
PATCHES, QUERIES, TOKENS = 32, 8, 24
# Parameters that multiply each of them, by hand.
VISION = 3 * (4 * 32 * 32 + 2 * 32 * 64)
PATCH_EMBED = 14 * 14 * 3 * 32
KV_PROJ = 32 * 64
ADAPTER_KV, ADAPTER_REST = 2 * 64 * 64, 3 * 64 * 64
DECODER = 2 * (4 * 64 * 64 + 3 * 64 * 96)
HEAD = 64 * 50
# FLOPs of a row's attention, forward: 4 x layers x width x pairs.
VISION_ATTENTION = 4 * 3 * 32 * 2 * 16 * 16
ADAPTER_ATTENTION = 4 * 64 * 2 * 4 * 16
DECODER_ATTENTION = 4 * 2 * 64 * 24 * 24 / 2


@pytest.fixture(scope='module')
def shapes():
  params = jax.eval_shape(NextToken(CONFIG).init, jax.random.key(0))
  unboxed = jax.tree.map(
    lambda x: x.value, params, is_leaf=lambda x: hasattr(x, 'names')
  )
  return {path: leaf.shape for path, leaf in flatten(unboxed).items()}


def trained(shapes, *parts):
  return frozenset(
    path
    for path in shapes
    if path.startswith(parts) and path != 'adapter/pos_embed'
  )


def counted(shapes, *parts, **changes):
  work = Work(**{**vars(WORK), **changes})
  return model_flops(CONFIG, shapes, trained(shapes, *parts), work) / work.rows


def test_forward_only(shapes):
  """2 FLOPs for each parameter and position."""
  assert counted(shapes, 'nothing') == (
    2 * PATCHES * (VISION + PATCH_EMBED + KV_PROJ + ADAPTER_KV)
    + 2 * QUERIES * ADAPTER_REST
    + 2 * TOKENS * (DECODER + HEAD)
    + VISION_ATTENTION
    + ADAPTER_ATTENTION
    + DECODER_ATTENTION
  )


def test_all_trained(shapes):
  """6, and attention three times; pixels need no gradient."""
  assert counted(shapes, 'vision/', 'adapter/', 'decoder/') == (
    PATCHES * (6 * (VISION + KV_PROJ + ADAPTER_KV) + 4 * PATCH_EMBED)
    + 6 * QUERIES * ADAPTER_REST
    + 6 * TOKENS * (DECODER + HEAD)
    + 3 * (VISION_ATTENTION + ADAPTER_ATTENTION + DECODER_ATTENTION)
  )


def test_frozen_decoder(shapes):
  """Stage 1: gradients only flow through it, 4."""
  assert counted(shapes, 'vision/', 'adapter/') == (
    PATCHES * (6 * (VISION + KV_PROJ + ADAPTER_KV) + 4 * PATCH_EMBED)
    + 6 * QUERIES * ADAPTER_REST
    + 4 * TOKENS * (DECODER + HEAD)
    + 3 * (VISION_ATTENTION + ADAPTER_ATTENTION + DECODER_ATTENTION)
  )


def test_frozen_vision(shapes):
  """Stage 3: 2 for what has no backward pass."""
  assert counted(shapes, 'adapter/', 'decoder/') == (
    PATCHES * (2 * (VISION + PATCH_EMBED) + 4 * KV_PROJ + 6 * ADAPTER_KV)
    + 6 * QUERIES * ADAPTER_REST
    + 6 * TOKENS * (DECODER + HEAD)
    + VISION_ATTENTION
    + 3 * (ADAPTER_ATTENTION + DECODER_ATTENTION)
  )


def test_decoding(shapes):
  """One token against a cache of 100, and no image."""
  assert (
    counted(shapes, 'nothing', length=1, images=0, keys=100, logits=1)
    == 2 * (DECODER + HEAD) + 4 * 2 * 64 * 100
  )


@pytest.mark.parametrize(
  'parts', [('vision/', 'adapter/', 'decoder/'), ('adapter/', 'decoder/')]
)
def test_a_compiled_program_needs_just_that(shapes, parts):
  """Without remat, but for the masked half of the decoder's attention."""
  wanted = trained(shapes, *parts)
  structs = {
    path: jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in shapes.items()
  }
  objective = NextToken(CONFIG)
  one = {path: s for path, s in structs.items() if path in wanted}
  rest = {path: s for path, s in structs.items() if path not in wanted}
  rows = {
    name: jax.ShapeDtypeStruct((WORK.rows, WORK.length), np.int32)
    for name in Batch.__dataclass_fields__
  }
  rows['pixels'] = jax.ShapeDtypeStruct((WORK.rows, 2, 56, 56, 3), np.uint8)
  rows['image_starts'] = jax.ShapeDtypeStruct((WORK.rows, 2), np.int32)
  rows['loss_weights'] = jax.ShapeDtypeStruct(rows['tokens'].shape, np.float32)

  def loss(one, rest, rows):
    return objective.loss(merge(one, rest), rows)[0]

  step = jax.jit(jax.grad(loss))
  text = step.lower(unflatten(one), unflatten(rest), rows).compile().as_text()
  found = flops.product_flops(hlo.parse(text))
  masked = 3 * DECODER_ATTENTION * WORK.rows
  # The adapter's table of 2 x 2 places resized to 4 x 4 patches.
  resizing = 2 * 4 * 2 * (2 * 64) + 2 * 4 * 2 * (4 * 64)
  needed = model_flops(CONFIG, shapes, wanted, WORK)
  assert found == needed + masked + resizing


def test_an_unknown_matrix_is_an_error(shapes):
  work = {'audio/kernel': (8, 8)}
  with pytest.raises(ConfigError, match='audio/kernel'):
    model_flops(CONFIG, work, frozenset(), WORK)
