"""Rotary position embedding, dynamic NTK frequencies and LogN scaling.

Released source: `modeling_qwen.py` (RotaryEmbedding, get_ntk_alpha,
logn_tensor). Everything here is float32.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Rows up to seq_length * 2**(_NTK_STEPS - 1) tokens get exact frequencies.
_NTK_STEPS = 12


def _frequency_table(head_dim: int, base: float) -> np.ndarray:
  """[_NTK_STEPS, H/2] float32: inverse frequencies, one row an NTK alpha.

  Row k is for alpha = 2**(k+1) - 1. As in the release the exponents are
  float32, the base is not rounded, and the power is rounded once: any other
  rounding moves the logits of long rows by 1e-4 (golden `long_text`).
  """
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  alphas = 2.0 ** np.arange(1, _NTK_STEPS + 1) - 1
  bases = base * alphas ** (head_dim / (head_dim - 2))
  powers = np.power(bases[:, None], exponent.astype(np.float64))
  return np.float32(1) / powers.astype(np.float32)


def ntk_step(lengths, seq_length: int) -> jax.Array:
  """Which row of the frequency table rows of these lengths use.

  The release computes alpha = max(2**ceil(log2(L / seq_length) + 1) - 1, 1);
  counting doublings gives the same without a logarithm's rounding.

  Args:
    lengths: [B] int, tokens of each prompt.
    seq_length: length the decoder was pre-trained at.

  Returns:
    [B] int32, 0 for rows up to `seq_length`.
  """
  thresholds = jnp.asarray(
    [seq_length * 2**k for k in range(_NTK_STEPS - 1)], jnp.int32
  )
  return jnp.sum(lengths[:, None] > thresholds, axis=1).astype(jnp.int32)


def rotary_angles(positions, head_dim: int, base: float, step=None):
  """Angles of the rotary embedding.

  Args:
    positions: [B,T] int.
    head_dim: H.
    base: rotary base.
    step: [B] int from `ntk_step`, or None for plain frequencies (training).

  Returns:
    (cos, sin), each [B,T,1,H/2] float32.
  """
  table = jnp.asarray(_frequency_table(head_dim, base))
  if step is None:
    frequencies = table[0][None, None]
  else:
    frequencies = table[jnp.minimum(step, _NTK_STEPS - 1)][:, None]
  angles = positions.astype(jnp.float32)[..., None] * frequencies
  return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x, cos, sin) -> jax.Array:
  """Rotates the two halves of the head dimension against each other.

  Args:
    x: [B,T,N,H].
    cos: [B,T,1,H/2] float32.
    sin: [B,T,1,H/2] float32.

  Returns:
    [B,T,N,H], dtype of x; computed in float32.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x.dtype)


def logn_scale(positions, seq_length: int) -> jax.Array:
  """LogN factor of the query at each position (inference only).

  Args:
    positions: [B,T] int, from 0.
    seq_length: positions up to this one (from 1) are left alone.

  Returns:
    [B,T,1,1] float32: log(i) / log(seq_length) where i = position + 1 is
    greater than `seq_length`, else 1.
  """
  index = (positions + 1).astype(jnp.float32)
  scale = jnp.log(index) / np.float32(np.log(seq_length))
  return jnp.where(index > seq_length, scale, 1.0)[..., None, None]
