"""Scaled dot-product attention and the bias that the batch contract implies.

The one place where the kernel is chosen; softmax is float32.
"""

import jax
import jax.numpy as jnp

_MASKED = -1e30


def attend(q, k, v, bias=None) -> jax.Array:
  """softmax(q k^T / sqrt(H) + bias) v.

  Args:
    q: [B,T,N,H].
    k: [B,S,N,H].
    v: [B,S,N,H].
    bias: broadcastable to [B,N,T,S] float32, None for none. A query that may
      see nothing (a very negative bias everywhere) gets the mean of v, never
      NaN.

  Returns:
    [B,T,N,H], dtype of v.
  """
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  # Heads first: batched products of plain matrices, which XLA runs on a CPU
  # three times as fast as the same contraction with heads in the middle.
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  scores = jnp.einsum(
    'BNTH,BNSH->BNTS', q, k, preferred_element_type=jnp.float32
  )
  if bias is not None:
    scores = scores + bias
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.swapaxes(jnp.einsum('BNTS,BNSH->BNTH', weights, v), 1, 2)


def causal_bias(
  query_index, query_segments, query_branches, key_segments, key_branches
) -> jax.Array:
  """Who may see whom in packed rows (see `Batch`), as a bias on the scores.

  Args:
    query_index: [T] int, where in the row of keys the queries stand.
    query_segments: [B,T] int.
    query_branches: [B,T] int.
    key_segments: [B,S] int, 0 for padding.
    key_branches: [B,S] int.

  Returns:
    [B,1,T,S] float32: 0, or very negative where T may not see S.
  """
  keys = jnp.arange(key_segments.shape[1])
  causal = keys[None, :] <= query_index[:, None]
  same = query_segments[:, :, None] == key_segments[:, None, :]
  real = (key_segments > 0)[:, None, :]
  trunk = (key_branches == 0)[:, None, :]
  branch = query_branches[:, :, None] == key_branches[:, None, :]
  seen = causal[None] & same & real & (trunk | branch)
  return jnp.where(seen, 0.0, _MASKED)[:, None]
