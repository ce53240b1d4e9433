"""Vision transformer (OpenCLIP ViT-bigG), any resolution.

Released source: `visual.py` (VisionTransformer). Position tables are resized
bicubically to the patch grid inside the forward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import LazyRng, Scope

from qwenvl_jax.errors import DataError
from qwenvl_jax.fsdp import gathered
from qwenvl_jax.model.attention import attend, full_mask
from qwenvl_jax.model.config import VisionConfig
from qwenvl_jax.model.layers import LayerNorm, Projection, gelu
from qwenvl_jax.model.lora import LoraConfig, Shared
from qwenvl_jax.model.positions import resize_positions, sincos_positions
from qwenvl_jax.model.remat import RESIDUAL, UP, keep, remat
from qwenvl_jax.sharding import constrain

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalize_pixels(pixels) -> jax.Array:
  """uint8 pixels to CLIP's normalized float32; float pixels pass unchanged.

  Args:
    pixels: [...,3] uint8 in [0, 255], or float already normalized.

  Returns:
    [...,3] float.
  """
  if pixels.dtype != jnp.uint8:
    return pixels
  return (pixels.astype(jnp.float32) / 255 - CLIP_MEAN) / CLIP_STD


class SelfAttention(nn.Module):
  """Multi-head attention over all patches, or within `config.window`."""

  config: VisionConfig
  dtype: Any
  param_dtype: Any
  attention: str
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, grid: tuple[int, int]):
    c = self.config
    kinds = {
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
      'lora': self.lora,
    }
    heads = (c.width, c.heads, c.head_dim)
    axes = ('embed', 'heads', 'head_dim')
    low = Shared((c.width,), ('embed',), **kinds, name='qkv')(x)

    def project(name):
      return Projection('BPD,DNH->BPNH', heads, axes, 2, **kinds, name=name)(
        x, low
      )

    def all_to_all(q, k, v):
      return attend(q, k, v, full_mask(q.shape[1], k.shape[1], self.attention))

    q, k, v = project('q'), project('k'), project('v')
    if c.window is None:
      out = all_to_all(q, k, v)
    else:
      out = windowed(all_to_all, q, k, v, grid=grid, window=c.window)
    return Projection(
      'BPNH,NHD->BPD',
      (c.heads, c.head_dim, c.width),
      ('heads', 'head_dim', 'embed'),
      1,
      **kinds,
      name='out',
    )(out)


def windowed(
  function: Callable, *arrays, grid: tuple[int, int], window: int
) -> jax.Array:
  """Applies attention within square windows of the patch grid.

  Args:
    function: of arrays [B,P,N,H].
    *arrays: [B,P,N,H], patches in raster order.
    grid: (rows, columns) of patches.
    window: side of a window in patches; must divide both.

  Returns:
    [B,P,N,H].

  Raises:
    DataError: the window does not divide the grid.
  """
  rows, columns = grid
  if rows % window or columns % window:
    raise DataError(
      f'a grid of {rows}x{columns} patches does not split into windows of '
      f'{window}x{window}: choose a resolution that is a multiple of '
      'patch_size * window'
    )
  sizes = {'r': rows // window, 'c': columns // window, 'a': window}
  split = 'b (r a c e) n h -> (b r c) (a e) n h'
  merge = '(b r c) (a e) n h -> b (r a c e) n h'
  sizes['e'] = window
  arrays = [einops.rearrange(x, split, **sizes) for x in arrays]
  return einops.rearrange(function(*arrays), merge, **sizes)


class Block(nn.Module):
  """Pre-norm transformer block; the scan's body.

  Attributes:
    config: shapes; with a window, the block attends within windows.
    dtype: of activations.
    param_dtype: of parameters.
    grid: (rows, columns) of patches.
    attention: kernel, see `QwenVLConfig`.
    lora: see there.
  """

  config: VisionConfig
  dtype: Any
  param_dtype: Any
  grid: tuple[int, int]
  attention: str
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, _=None):
    c = self.config
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    kinds['lora'] = self.lora
    h = LayerNorm(c.norm_eps, self.param_dtype, name='ln_1')(x)
    attention = SelfAttention(c, **kinds, attention=self.attention, name='attn')
    x = keep(x + attention(h, self.grid), RESIDUAL)
    h = LayerNorm(c.norm_eps, self.param_dtype, name='ln_2')(x)
    x = x + Mlp(c, **kinds, name='mlp')(h)
    return constrain(x, 'batch', 'patches', 'embed_act'), None


class Mlp(nn.Module):
  """Two projections around an exact GELU."""

  config: VisionConfig
  dtype: Any
  param_dtype: Any
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x):
    c = self.config
    kinds = {
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
      'lora': self.lora,
    }
    h = Projection(
      'BPD,DF->BPF',
      (c.width, c.mlp_dim),
      ('embed', 'mlp'),
      1,
      **kinds,
      name='up',
    )(x)
    h = gelu(keep(h, UP))
    return Projection(
      'BPF,FD->BPD',
      (c.mlp_dim, c.width),
      ('mlp', 'embed'),
      1,
      **kinds,
      name='down',
    )(h)


def _sincos(key, shape, dtype):
  # As large as what patches show from the start: a table that starts near zero
  # takes a small model's first minutes to tell places apart.
  del key
  return jnp.asarray(sincos_positions(round(shape[0] ** 0.5), shape[1]), dtype)


class VisionTransformer(nn.Module):
  """Pixels to patch features.

  Attributes:
    config: shapes.
    dtype: of activations.
    param_dtype: of parameters.
    remat: policy of the blocks.
    unroll: blocks in a step of their scan.
    attention: kernel, see `QwenVLConfig`.
    lora: see there.
  """

  config: VisionConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = 'none'
  unroll: int = 1
  attention: str = 'auto'
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, pixels):
    """Encodes images.

    Args:
      pixels: [B,R,R',3], uint8 or normalized float; R and R' multiples of the
        patch size.

    Returns:
      [B,P,D] features in raster order; no final norm (it is the adapter's).

    Raises:
      DataError: a side is not a multiple of the patch size.
    """
    c = self.config
    _, height, width, _ = pixels.shape
    if height % c.patch_size or width % c.patch_size:
      raise DataError(
        f'images of {height}x{width} pixels do not split into patches of '
        f'{c.patch_size}: resize them to a multiple of {c.patch_size}'
      )
    grid = height // c.patch_size, width // c.patch_size
    patches = einops.rearrange(
      normalize_pixels(pixels),
      'b (h i) (w j) c -> b (h w) i j c',
      i=c.patch_size,
      j=c.patch_size,
    )
    x = Projection(
      'BPijc,ijcD->BPD',
      (c.patch_size, c.patch_size, 3, c.width),
      ('patch_rows', 'patch_columns', 'colours', 'embed'),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='patch_embed',
    )(patches)
    positions = self.param(
      'pos_embed',
      nn.with_logical_partitioning(_sincos, ('positions', 'embed')),
      (c.position_grid**2, c.width),
      self.param_dtype,
    )
    positions = gathered(positions, ('positions', 'embed'))
    x = x + resize_positions(positions, grid).astype(self.dtype)
    x = LayerNorm(c.norm_eps, self.param_dtype, name='ln_pre')(x)
    self.sow('intermediates', 'after_ln_pre', x)
    x = constrain(x, 'batch', 'patches', 'embed_act')
    make = functools.partial(
      remat(Block, self.remat),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      grid=grid,
      attention=self.attention,
      lora=self.lora,
    )
    everywhere = dataclasses.replace(c, window=None)
    if c.window is not None and not self.is_initializing():
      stacked = nn.meta.unbox(self.variables['params']['blocks'])
      keys = None
      if self.has_rng('dropout'):
        keys = jax.random.split(self.make_rng('dropout'), c.layers)
      # Where a block is says whether it is adapted (`lora`).
      path = *self.path, 'blocks'
      return _alternate(make, (stacked, keys), x, c, path)
    blocks = nn.scan(
      make.func,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      length=c.layers,
      unroll=self.unroll,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(everywhere, **make.keywords, name='blocks')
    x, _ = blocks(x, None)
    return x


def _alternate(
  make: Callable, stacked, x, config: VisionConfig, path: tuple[str, ...]
):
  """Applies stacked blocks: every `global_every`-th one is global.

  Which block attends how is part of the program, so that a backward pass keeps
  nothing of the attention that a block does not use.

  Args:
    make: of a config and a scope, a block.
    stacked: (parameters, keys of dropout or None) of `config.layers` blocks,
      as the scan's are.
    x: [B,P,D].
    config: with a window.
    path: of the blocks in the tree of modules.

  Returns:
    [B,P,D].
  """
  size = config.global_every
  whole = config.layers // size * size
  within, over = config, dataclasses.replace(config, window=None)

  def apply(config, x, one):
    params, key = one
    rngs = {} if key is None else {'dropout': LazyRng.create(key)}
    scope = Scope({'params': params}, rngs, path=path)
    return make(config, parent=scope)(x)

  def group(x, several):
    for i in range(size):
      block = over if i == size - 1 else within
      one = jax.tree.map(lambda leaf, i=i: leaf[i], several)
      x, _ = apply(block, x, one)
    return x, None

  if whole:
    shape = whole // size, size
    grouped = jax.tree.map(
      lambda leaf: leaf[:whole].reshape(*shape, *leaf.shape[1:]), stacked
    )
    x, _ = jax.lax.scan(group, x, grouped)
  if whole < config.layers:
    rest = jax.tree.map(lambda leaf: leaf[whole:], stacked)
    x, _ = jax.lax.scan(functools.partial(apply, within), x, rest)
  return x
