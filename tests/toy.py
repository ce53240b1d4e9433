"""A model of a few thousand parameters, for tests of what is around it."""

import functools

import flax.linen as nn
import jax
import numpy as np

from qwenvl_jax import batch
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)
from qwenvl_jax.model.qwen_vl import QwenVL

IMAGE_START = 300
QUERIES = 16
SIDE = 28
VOCABULARY = 320
# Of an image, in a prompt.
SPAN = [IMAGE_START, *[IMAGE_START + 2] * QUERIES, IMAGE_START + 1]


def config(layers: int = 1, dim: int = 32) -> QwenVLConfig:
  """Layers apart, float32; NTK and LogN from 384 tokens on, as the goldens."""
  return QwenVLConfig(
    vision=VisionConfig(SIDE, width=16, layers=1, heads=1, mlp_dim=16),
    adapter=AdapterConfig(queries=QUERIES, dim=dim, heads=1),
    decoder=DecoderConfig(
      vocab_size=VOCABULARY,
      dim=dim,
      layers=layers,
      heads=2,
      head_dim=dim // 2,
      mlp_dim=2 * dim,
      seq_length=384,
      max_position_embeddings=4096,
    ),
    image_start_id=IMAGE_START,
    dtype='float32',
    remat='none',
    scan_layers=False,
  )


@functools.cache
def params(config: QwenVLConfig) -> dict:
  """Random parameters, large enough for answers that vary."""
  shapes = jax.eval_shape(
    QwenVL(config).init, jax.random.key(0), batch.text_batch(np.zeros((1, 4)))
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == 'scale':
      return np.ones(leaf.shape, np.float32)
    size = {'embed': 0.5, 'bias': 0.1}.get(path[-1].key, 0.2)
    if path[-2].key == 'lm_head':
      size = 0.7  # What is drawn is to depend on what the model says.
    return rng.normal(0, size, leaf.shape).astype(np.float32)

  found = jax.tree_util.tree_map_with_path(
    draw, nn.meta.unbox(shapes)['params']
  )
  # Bound to a device, as what is read from a checkpoint.
  return jax.device_put(found, jax.devices()[0])


def engine(layers: int = 1, dim: int = 32, **sizes) -> Engine:
  found = config(layers, dim)
  return Engine(found, params(found), EngineConfig(**sizes))


def picture(seed: int, side: int = SIDE) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (side, side, 3), np.uint8)


def prompt(seed: int, length: int, pictures: int = 0) -> list[int]:
  """So many ids, with the spans of so many pictures among them."""
  rng = np.random.default_rng(seed)
  text = length - pictures * len(SPAN)
  ids = rng.integers(0, IMAGE_START, text).tolist()
  # From the end, so that places stay; the last id is always text.
  for place in sorted(rng.integers(0, text, pictures), reverse=True):
    ids[place:place] = SPAN
  return ids


def damaged(params: dict, token: int) -> dict:
  """The same parameters, but for a token's embedding, which is not finite."""
  embed = np.array(params['decoder']['embed'])
  embed[token] = np.nan
  embed = jax.device_put(embed, jax.devices()[0])
  return params | {'decoder': params['decoder'] | {'embed': embed}}
