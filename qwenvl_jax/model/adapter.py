"""Position-aware adapter: a fixed number of queries read the patches.

Released source: `visual.py` (Resampler). Query and key carry a fixed 2-D
sine-cosine position; the value does not.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.initializers import ones

from qwenvl_jax.fsdp import gathered, multiply
from qwenvl_jax.model.attention import attend, full_mask
from qwenvl_jax.model.config import AdapterConfig
from qwenvl_jax.model.layers import (
  LayerNorm,
  Projection,
  default_init,
)
from qwenvl_jax.model.positions import resize_positions, sincos_positions
from qwenvl_jax.sharding import constrain


def _scaled_identity(scale: float):
  """Kernel [D,N,H] (or [N,H,D]) that is `scale` times the identity."""

  def init(key, shape, dtype=jnp.float32):
    del key
    return (scale * jnp.eye(max(shape), dtype=dtype)).reshape(shape)

  return init


# Initializers that differ from the defaults, by parameter or module. Aligned:
# at first a query knows its place and nothing else, content weighs little in
# the scores (neighbouring places differ by 0.5 against a noise of 0.2 a
# channel group), and values pass through unchanged.
_RANDOM = {}
_ALIGNED = {
  'ln_q': nn.initializers.zeros,
  'ln_kv': nn.initializers.constant(0.1),
  'q': _scaled_identity(5.0),
  'k': _scaled_identity(5.0),
  'v': _scaled_identity(10.0),
  'out': _scaled_identity(1.0),
}


class Adapter(nn.Module):
  """Patch features to Q image features of the decoder's width."""

  config: AdapterConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  attention: str = 'auto'

  @nn.compact
  def __call__(self, x, grid: tuple[int, int]):
    """Reads the patches.

    Args:
      x: [B,P,W] patch features in raster order.
      grid: (rows, columns) of patches.

    Returns:
      [B,Q,D].
    """
    c = self.config
    part = nn.with_logical_partitioning
    init = _ALIGNED if c.init == 'aligned' else _RANDOM
    query = self.param(
      'query',
      part(default_init, ('queries', 'embed')),
      (c.queries, c.dim),
      self.param_dtype,
    )
    positions = self.param(
      'pos_embed',
      part(
        lambda key, shape, dtype: jnp.asarray(
          sincos_positions(c.grid, c.dim), dtype
        ),
        ('queries', 'embed'),
      ),
      (c.queries, c.dim),
      self.param_dtype,
    )
    query = gathered(query.astype(self.dtype), ('queries', 'embed'))
    positions = gathered(positions, ('queries', 'embed'))
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}

    def norm(name):
      return LayerNorm(
        c.norm_eps, self.param_dtype, init.get(name, ones), name=name
      )

    kv = Projection(
      'BPW,WD->BPD',
      (x.shape[-1], c.dim),
      ('embed', 'mlp'),
      **kinds,
      name='kv_proj',
    )(x)
    # Whole features between two split matrices: XLA's partitioner loses the sum
    # over the mesh's axes in the backward pass otherwise (openxla/xla#40034).
    kv = constrain(kv, 'batch', 'patches', 'embed_act')
    kv = norm('ln_kv')(kv)
    q = norm('ln_q')(query)
    q = jnp.broadcast_to(
      q + positions.astype(self.dtype), (x.shape[0], c.queries, c.dim)
    )
    k = kv + resize_positions(positions, grid).astype(self.dtype)
    heads = (c.dim, c.heads, c.head_dim)
    axes = ('embed', 'heads', 'head_dim')

    def project(name, inputs):
      return Projection(
        'BSD,DNH->BSNH',
        heads,
        axes,
        2,
        **kinds,
        kernel_init=init.get(name),
        name=name,
      )(inputs)

    mask = full_mask(c.queries, x.shape[1], self.attention)
    out = attend(project('q', q), project('k', k), project('v', kv), mask)
    out = Projection(
      'BQNH,NHD->BQD',
      (c.heads, c.head_dim, c.dim),
      ('heads', 'head_dim', 'embed'),
      1,
      **kinds,
      kernel_init=init.get('out'),
      name='out',
    )(out)
    self.sow('intermediates', 'after_adapter', out)
    out = norm('ln_post')(out)
    proj = self.param(
      'proj',
      part(
        nn.initializers.normal(c.dim**-0.5),
        ('embed', 'mlp'),
      ),
      (c.dim, c.dim),
      self.param_dtype,
    )
    return multiply(out, proj.astype(self.dtype), ('embed', 'mlp'), 1)
