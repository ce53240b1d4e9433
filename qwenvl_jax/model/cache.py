"""Key-value cache of the decoder, a plain pytree that `extend` returns anew."""

import dataclasses

import jax
import jax.numpy as jnp

from qwenvl_jax.model.config import QwenVLConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of all layers for B rows of up to S tokens.

  Attributes:
    keys: [L,B,S,N,H], already rotated.
    values: [L,B,S,N,H].
    segment_ids: [B,S] int32; 0 for padding and for slots not yet written.
    used: [] int32, slots written so far, the same for all rows (prompts are
      padded on the left).
    prompt_lengths: [B] int32, real tokens of each prompt. The NTK frequencies
      follow from it and stay as the cache grows.
  """

  keys: jax.Array
  values: jax.Array
  segment_ids: jax.Array
  used: jax.Array
  prompt_lengths: jax.Array

  @classmethod
  def create(
    cls, config: QwenVLConfig, batch_size: int, size: int, prompt_lengths
  ) -> 'KVCache':
    """An empty cache for `batch_size` rows of `size` slots."""
    decoder = config.decoder
    shape = (decoder.layers, batch_size, size, decoder.heads, decoder.head_dim)
    return cls(
      keys=jnp.zeros(shape, config.dtype),
      values=jnp.zeros(shape, config.dtype),
      segment_ids=jnp.zeros((batch_size, size), jnp.int32),
      used=jnp.zeros((), jnp.int32),
      prompt_lengths=jnp.asarray(prompt_lengths, jnp.int32),
    )
