"""Scaled dot-product attention and the masks that the batch contract implies.

The one place where the kernel is chosen; softmax is float32.
"""

import jax
import jax.numpy as jnp

_MASKED = -1e30


def attend(q, k, v, mask=None) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v.

  Args:
    q: [B,T,N,H].
    k: [B,S,N,H].
    v: [B,S,N,H].
    mask: broadcastable to [B,N,T,S] bool, true where T may see S; None for
      all. A query that may see nothing gets the mean of v (never NaN).

  Returns:
    [B,T,N,H], dtype of v.
  """
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  scores = jnp.einsum(
    'BTNH,BSNH->BNTS', q, k, preferred_element_type=jnp.float32
  )
  if mask is not None:
    scores = jnp.where(mask, scores, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BNTS,BSNH->BTNH', weights, v)


def causal_mask(
  query_index, query_segments, query_branches, key_segments, key_branches
) -> jax.Array:
  """Who may see whom in packed rows (see `Batch`).

  Args:
    query_index: [T] int, where in the row of keys the queries stand.
    query_segments: [B,T] int.
    query_branches: [B,T] int.
    key_segments: [B,S] int, 0 for padding.
    key_branches: [B,S] int.

  Returns:
    [B,1,T,S] bool.
  """
  keys = jnp.arange(key_segments.shape[1])
  causal = keys[None, :] <= query_index[:, None]
  same = query_segments[:, :, None] == key_segments[:, None, :]
  real = (key_segments > 0)[:, None, :]
  trunk = (key_branches == 0)[:, None, :]
  branch = query_branches[:, :, None] == key_branches[:, None, :]
  return (causal[None] & same & real & (trunk | branch))[:, None]
