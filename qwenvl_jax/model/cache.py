"""Key-value cache of the decoder: a plain pytree with an array a layer.

Row b's token i is at index i of every layer. Where nothing was written yet, or
what was written belongs to nobody any more, an index holds any finite value:
attention never weighs it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.sharding import constrain

# The largest int8 whose negative is one, too.
_INT8_MAX = 127.0


class LayerCache(NamedTuple):
  """One layer's keys and values for B rows of up to S tokens.

  Attributes:
    keys: [B,N,S,H], already rotated; in the compute dtype, or int8.
    values: [B,N,S,H].
    key_scales: [B,N,S] float32 of int8 keys, else None: each vector [H] is its
      int8 values times its scale.
    value_scales: the same of the values.
  """

  keys: jax.Array
  values: jax.Array
  key_scales: jax.Array | None = None
  value_scales: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of all layers.

  Attributes:
    layers: one `LayerCache` a layer.
    lengths: [B] int32, tokens of each row in the cache.
    prompt_lengths: [B] int32, tokens of each row's whole prompt. The NTK
      frequencies follow from it and stay as the row grows.
    ranks: [B,R] float32, what each row multiplies the ranks of low-rank
      adapters by, where several are side by side (`LoraConfig.by_row`); None
      elsewhere.
  """

  layers: tuple[LayerCache, ...]
  lengths: jax.Array
  prompt_lengths: jax.Array
  ranks: jax.Array | None = None

  @classmethod
  def create(
    cls,
    config: QwenVLConfig,
    rows: int,
    size: int,
    prompt_lengths: Any = 0,
    dtype: Any = None,
    ranks: Any = 0,
  ) -> 'KVCache':
    """Makes an empty cache.

    Args:
      config: of the model.
      rows: B.
      size: S, tokens that a row has room for.
      prompt_lengths: int or [B] int.
      dtype: of keys and values: None for the compute dtype, or 'int8'.
      ranks: [B,R] float, or 0 for rows without an adapter.
    """
    decoder, lora = config.decoder, config.lora
    if lora is None or not lora.by_row:
      ranks = None
    else:
      ranks = jnp.zeros((rows, lora.rank), jnp.float32) + ranks
    dtype = jnp.dtype(dtype or config.dtype)
    shape = (rows, decoder.heads, size, decoder.head_dim)
    return cls(
      layers=tuple(_empty_layer(shape, dtype) for _ in range(decoder.layers)),
      lengths=jnp.zeros(rows, jnp.int32),
      prompt_lengths=jnp.zeros(rows, jnp.int32) + prompt_lengths,
      ranks=ranks,
    )

  @property
  def size(self) -> int:
    """S, tokens that a row has room for."""
    return self.layers[0].keys.shape[2]


def _empty_layer(shape, dtype) -> LayerCache:
  scales = jnp.ones(shape[:3], jnp.float32) if dtype == jnp.int8 else None
  zeros = jnp.zeros(shape, dtype)
  return place_layer(LayerCache(zeros, zeros, scales, scales))


def place_layer(layer: LayerCache) -> LayerCache:
  """Splits rows and heads over the mesh in use."""
  return LayerCache(
    *(
      None
      if x is None
      else constrain(x, *('cache_rows', 'cache_heads', None, None)[: x.ndim])
      for x in layer
    )
  )


def write(layer: LayerCache, k, v, offset) -> LayerCache:
  """Writes T tokens of every row, at the same place in each.

  Args:
    layer: of B rows.
    k: [B,N,T,H] rotated keys.
    v: [B,N,T,H].
    offset: [] int32, index of the first of them.
  """
  if layer.key_scales is None:
    new = LayerCache(k, v)
  else:
    (k, key_scales), (v, value_scales) = quantize(k), quantize(v)
    new = LayerCache(k, v, key_scales, value_scales)

  def put(old, part):
    if old is None:
      return None
    start = (0, 0, offset, 0)[: old.ndim]
    return jax.lax.dynamic_update_slice(old, part.astype(old.dtype), start)

  return place_layer(LayerCache(*map(put, layer, new)))


def read(layer: LayerCache, dtype) -> tuple[jax.Array, jax.Array]:
  """Keys and values [B,N,S,H] of all indices in a float dtype."""
  if layer.key_scales is None:
    return layer.keys, layer.values
  return (
    dequantize(layer.keys, layer.key_scales, dtype),
    dequantize(layer.values, layer.value_scales, dtype),
  )


def quantize(x) -> tuple[jax.Array, jax.Array]:
  """Rounds each vector [H] to int8 by the largest of its magnitudes.

  Args:
    x: [...,H] float.

  Returns:
    ([...,H] int8, [...] float32 scales).
  """
  x = x.astype(jnp.float32)
  scales = jnp.max(jnp.abs(x), axis=-1) / _INT8_MAX
  # A vector of zeros stays one, and one that is not finite does not pass for
  # one that is: its scale is not finite either.
  scales = jnp.where(scales == 0, 1.0, scales)
  return jnp.round(x / scales[..., None]).astype(jnp.int8), scales


def dequantize(values, scales, dtype) -> jax.Array:
  """The inverse of `quantize`, in a float dtype."""
  return (values.astype(jnp.float32) * scales[..., None]).astype(dtype)
