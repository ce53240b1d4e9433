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

# Parameters that no stage trains: the adapter's sine-cosine table is a constant
# that the released checkpoint happens to store. Training keeps them in float32.
CONSTANTS = ('adapter/pos_embed',)


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
      c.vision, **kinds, **how, remat=c.vision_remat or c.remat, lora=c.lora
    )
    self.adapter = Adapter(c.adapter, **kinds, attention=c.attention)
    self.decoder = Decoder(
      c.decoder,
      **kinds,
      **how,
      remat=c.remat,
      scan_layers=c.scan_layers,
      lora=c.lora,
    )

  def __call__(self, batch: Batch, *, inference: bool = False):
    """Logits of every position.

    Args:
      batch: see `Batch`.
      inference: dynamic NTK and LogN past `seq_length`, as the release does
        outside of training.

    Returns:
      [B,T,V] in the compute dtype.
    """
    x = self.decoder(
      self._embed(batch),
      batch.positions,
      batch.segment_ids,
      batch.branch_ids,
      inference=inference,
    )
    return self.decoder.head(x)

  def extend(
    self,
    tokens,
    cache: KVCache,
    offset=None,
    features=None,
    rows=None,
    last=None,
  ):
    """Appends tokens to every row of a cache (inference mode).

    Args:
      tokens: [B,T] int32.
      cache: see `Decoder.extend`.
      offset: see there.
      features: [M,D] image features of which tokens may be replaced.
      rows: [B,T] int32, which of them each token's embedding is replaced by; -1
        for none.
      last: see `Decoder.extend`.

    Returns:
      ([B,T,D] or [B,1,D] hidden states for `head`, the cache; its `lengths` are
      as before).
    """
    x = self.decoder.embed_tokens(tokens)
    if features is not None:
      taken = jnp.take(features, jnp.maximum(rows, 0), axis=0).astype(x.dtype)
      x = jnp.where((rows >= 0)[..., None], taken, x)
    x = constrain(x, 'batch', 'length', 'embed_act')
    return self.decoder.extend(x, cache, offset, last)

  def decode(self, tokens, cache: KVCache):
    """Appends one token to every row of a cache (inference mode).

    Args:
      tokens: [B] int32.
      cache: see `Decoder.decode`.

    Returns:
      ([B,V] logits of the next token, the cache; its `lengths` are as before).
    """
    x = self.decoder.embed_tokens(tokens[:, None])
    x, cache = self.decoder.decode(x, cache)
    return self.decoder.head(x)[:, 0], cache

  def head(self, x):
    """Logits [...,T,V] of hidden states [...,T,D]."""
    return self.decoder.head(x)

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
