"""The assembly: image features take the places of the `<img>` spans' ids."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.batch import Batch
from qwenvl_jax.model.adapter import Adapter
from qwenvl_jax.model.cache import KVCache
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.decoder import Decoder
from qwenvl_jax.model.vision import VisionTransformer
from qwenvl_jax.sharding import constrain


def place_features(embeddings, features, image_starts) -> jax.Array:
  """Puts image features over the embeddings of their spans.

  A gather, not a scatter: every position asks which feature it holds, so rows
  stay independent under sharding.

  Args:
    embeddings: [B,T,D].
    features: [B,I,Q,D].
    image_starts: [B,I] int32, negative for unused slots.

  Returns:
    [B,T,D].
  """
  batch, slots, queries, dim = features.shape
  offset = (
    jnp.arange(embeddings.shape[1])[None, :, None] - (image_starts[:, None, :])
  )
  inside = (offset >= 0) & (offset < queries) & (image_starts >= 0)[:, None, :]
  index = jnp.sum(
    jnp.where(inside, offset + jnp.arange(slots) * queries, 0), axis=-1
  )
  flat = features.reshape(batch, slots * queries, dim)
  placed = jnp.take_along_axis(flat, index[..., None], axis=1)
  return jnp.where(inside.any(-1)[..., None], placed, embeddings)


class QwenVL(nn.Module):
  """Qwen-VL: vision transformer, adapter, decoder.

  The tree of parameters has the children `vision`, `adapter` and `decoder`.
  """

  config: QwenVLConfig

  def setup(self):
    c = self.config
    kinds = {'dtype': c.dtype, 'param_dtype': c.param_dtype}
    how = {'unroll': c.unroll, 'attention': c.attention}
    self.vision = VisionTransformer(
      c.vision, **kinds, **how, remat=c.vision_remat or c.remat
    )
    self.adapter = Adapter(c.adapter, **kinds, attention=c.attention)
    self.decoder = Decoder(c.decoder, **kinds, **how, remat=c.remat)

  def __call__(self, batch: Batch, *, inference: bool = False):
    """Logits of every position.

    Args:
      batch: see `Batch`.
      inference: dynamic NTK and LogN past `seq_length`, as the release does
        outside of training.

    Returns:
      [B,T,V] in the compute dtype.
    """
    x, _ = self.decoder(
      self._embed(batch),
      batch.positions,
      batch.segment_ids,
      batch.branch_ids,
      inference=inference,
    )
    return self.decoder.head(x)

  def extend(self, batch: Batch, cache: KVCache):
    """Appends the batch's tokens to the cache (inference mode).

    Prefill and decoding alike. Prompts are padded on the left, so that the
    last position is real in every row.

    Args:
      batch: T tokens a row; targets, weights and branches are not used.
      cache: with room for T more tokens.

    Returns:
      ([B,V] logits of the last position, the new cache).
    """
    x, cache = self.decoder(
      self._embed(batch),
      batch.positions,
      batch.segment_ids,
      inference=True,
      cache=cache,
    )
    return self.decoder.head(x[:, -1:])[:, 0], cache

  def encode_images(self, pixels):
    """Image features.

    Args:
      pixels: [...,R,R,3], uint8 or normalized float.

    Returns:
      [...,Q,D].
    """
    *lead, height, width, channels = pixels.shape
    patch = self.config.vision.patch_size
    flat = pixels.reshape(-1, height, width, channels)
    x = self.vision(flat)
    self.sow('intermediates', 'after_blocks', x)
    x = self.adapter(x, (height // patch, width // patch))
    return x.reshape(*lead, *x.shape[1:])

  def _embed(self, batch: Batch):
    x = self.decoder.embed_tokens(batch.tokens)
    if batch.image_starts.shape[1] or self.is_initializing():
      pixels = batch.pixels
      if not batch.image_starts.shape[1]:
        side = self.config.vision.image_size
        pixels = jnp.zeros((1, side, side, 3), jnp.uint8)
      features = self.encode_images(pixels)
      if batch.image_starts.shape[1]:
        x = place_features(x, features, batch.image_starts)
    return constrain(x, 'batch', 'length', 'embed_act')
