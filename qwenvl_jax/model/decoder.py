"""Qwen-7B decoder.

Released source: `modeling_qwen.py` (QWenModel). One block serves
training, prefill and decoding.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.fsdp import take_rows
from qwenvl_jax.model import rope
from qwenvl_jax.model.attention import (
  Mask,
  attend,
  attend_heads_first,
  cached_mask,
  causal_mask,
)
from qwenvl_jax.model.cache import KVCache, LayerCache, read, write
from qwenvl_jax.model.config import DecoderConfig
from qwenvl_jax.model.decode_attention import decode_attention
from qwenvl_jax.model.layers import Projection, RMSNorm
from qwenvl_jax.model.lora import LoraConfig, Shared
from qwenvl_jax.model.remat import GATE, RESIDUAL, UP, keep, remat
from qwenvl_jax.sharding import constrain

# A random decoder only ever stands in for the released one. With its 0.02 a
# token's identity would drown in what the first blocks add to it.
_embed_init = nn.initializers.normal(0.5)


class Context(NamedTuple):
  """What all layers use alike.

  Attributes:
    cos: [B,T,1,H/2] float32, of the rotary embedding.
    sin: [B,T,1,H/2] float32.
    logn: [B,T,1,1] float32 LogN scale of the queries, None for none.
    mask: who may see whom; None for one token a row against its cache.
    offset: [] int32, where in the cache T tokens of every row go; None for at
      its start, where they see each other only.
  """

  cos: jax.Array
  sin: jax.Array
  logn: jax.Array | None = None
  mask: Mask | None = None
  offset: jax.Array | None = None


class Last(NamedTuple):
  """Of the last layer, the one token a row whose hidden state is wanted.

  Attributes:
    index: [B] int32, among the T tokens.
    context: of these tokens alone.
  """

  index: jax.Array
  context: Context

  def take(self, x) -> jax.Array:
    """[B,1,...] of [B,T,...]."""
    index = self.index.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1)


class SelfAttention(nn.Module):
  """Causal attention with rotary positions; optionally through a cache."""

  config: DecoderConfig
  dtype: Any
  param_dtype: Any
  outputs_first: bool = False
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, context: Context, cache=None, lengths=None, last=None):
    c = self.config
    kinds = {
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
      'int4_group': c.int4_group,
      'int4_zero_offset': c.int4_zero_offset,
      'outputs_first': self.outputs_first,
      'int8': c.int8,
      'lora': self.lora,
    }

    low = Shared(
      (c.dim,), ('embed',), self.lora, self.dtype, self.param_dtype, name='qkv'
    )(x)

    def project(name, x, low):
      return Projection(
        'BTD,DNH->BTNH',
        (c.dim, c.heads, c.head_dim),
        ('embed', 'heads', 'head_dim'),
        2,
        **kinds,
        name=name,
      )(x, low)

    k = rope.rotate(project('k', x, low), context.cos, context.sin)
    v = project('v', x, low)
    if last is not None:
      x, context = last.take(x), last.context
      low = None if low is None else last.take(low)
    q = rope.rotate(project('q', x, low), context.cos, context.sin)
    if context.logn is not None:
      q = (q * context.logn).astype(self.dtype)
    if cache is None:
      out = attend(q, k, v, context.mask)
    elif context.mask is None:
      out, cache = decode_attention(q[:, 0], k[:, 0], v[:, 0], cache, lengths)
      out = out[:, None]
    else:
      out, cache = _extend(q, k, v, cache, context)
    out = Projection(
      'BTNH,NHD->BTD',
      (c.heads, c.head_dim, c.dim),
      ('heads', 'head_dim', 'embed'),
      **kinds,
      name='out',
    )(out)
    return out, cache


def _extend(q, k, v, cache: LayerCache, context: Context):
  """Appends T tokens a row to a cache; they see it and each other."""
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  start = 0 if context.offset is None else context.offset
  cache = write(cache, k, v, start)
  if context.offset is not None:
    k, v = read(cache, v.dtype)
  out = attend_heads_first(q, k, v, context.mask)
  return jnp.swapaxes(out, 1, 2), cache


class Mlp(nn.Module):
  """Gated MLP. In the release's names up is w1 and the gate is w2."""

  config: DecoderConfig
  dtype: Any
  param_dtype: Any
  outputs_first: bool = False
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x):
    c = self.config
    kinds = {
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
      'int4_group': c.int4_group,
      'int4_zero_offset': c.int4_zero_offset,
      'outputs_first': self.outputs_first,
      'int8': c.int8,
      'lora': self.lora,
    }

    def project(name):
      return Projection(
        'BTD,DF->BTF',
        (c.dim, c.mlp_dim),
        ('embed', 'mlp'),
        **kinds,
        name=name,
      )(x)

    up, gate = keep(project('up'), UP), keep(project('gate'), GATE)
    h = up * jax.nn.silu(gate)
    return Projection(
      'BTF,FD->BTD', (c.mlp_dim, c.dim), ('mlp', 'embed'), **kinds, name='down'
    )(h)


class Block(nn.Module):
  """Pre-norm transformer block; where layers are stacked, the scan's body."""

  config: DecoderConfig
  dtype: Any
  param_dtype: Any
  outputs_first: bool = False
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, context, cache=None, lengths=None, last=None):
    c = self.config
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    kinds |= {'outputs_first': self.outputs_first, 'lora': self.lora}
    h = RMSNorm(c.norm_eps, self.param_dtype, name='ln_1')(x)
    attention = SelfAttention(c, **kinds, name='attn')
    h, cache = attention(h, context, cache, lengths, last)
    x = x if last is None else last.take(x)
    x = keep(x + h, RESIDUAL)
    h = RMSNorm(c.norm_eps, self.param_dtype, name='ln_2')(x)
    x = x + Mlp(c, **kinds, name='mlp')(h)
    return constrain(x, 'batch', 'length', 'embed_act'), cache


class Decoder(nn.Module):
  """Token embeddings, blocks and head, called one after the other."""

  config: DecoderConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = 'none'
  unroll: int = 1
  attention: str = 'auto'
  scan_layers: bool = True
  lora: LoraConfig | None = None

  def setup(self):
    c = self.config
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    kinds['lora'] = self.lora
    first = {'outputs_first': not self.scan_layers}
    if c.int8 and self.scan_layers:
      raise ConfigError(
        'DecoderConfig.int8 is for inference, with QwenVLConfig.scan_layers='
        'False: train in bfloat16 or float32'
      )
    self.embed_table = self.param(
      'embed',
      nn.with_logical_partitioning(_embed_init, ('vocab_rows', 'embed')),
      (c.vocab_size, c.dim),
      self.param_dtype,
    )
    if self.scan_layers:
      self.blocks = nn.scan(
        remat(Block, self.remat),
        variable_axes={'params': 0},
        split_rngs={'params': True, 'dropout': True},
        in_axes=nn.broadcast,
        length=c.layers,
        unroll=self.unroll,
        metadata_params={nn.PARTITION_NAME: 'layers'},
      )(c, **kinds)
    else:
      self.blocks = [Block(c, **kinds, **first) for _ in range(c.layers)]
    self.ln_f = RMSNorm(c.norm_eps, self.param_dtype)
    self.lm_head = Projection(
      'BTD,DV->BTV',
      (c.dim, c.vocab_size),
      ('embed', 'vocab'),
      **kinds,
      **first,
      int8=c.int8,
    )

  def embed_tokens(self, tokens):
    """[B,T] int32 to [B,T,D]."""
    return take_rows(
      self.embed_table, ('vocab_rows', 'embed'), tokens, self.dtype
    )

  def __call__(
    self, x, positions, segment_ids, branch_ids=None, *, inference: bool = False
  ):
    """Runs the blocks and the final norm on whole rows.

    Args:
      x: [B,T,D] embeddings.
      positions: [B,T] int32.
      segment_ids: [B,T] int32, 0 for padding.
      branch_ids: [B,T] int32, None if there are no branches.
      inference: dynamic NTK and LogN for rows past `seq_length`.

    Returns:
      [B,T,D] hidden states.
    """
    lengths = None
    if inference:
      lengths = jnp.max(jnp.where(segment_ids > 0, positions + 1, 0), axis=1)
    context = self._context(positions, lengths)
    mask = causal_mask(segment_ids, branch_ids, self.attention)
    context = context._replace(mask=mask)
    if self.scan_layers:
      x, _ = self.blocks(x, context)
    else:
      for block in self.blocks:
        x, _ = block(x, context)
    return self.ln_f(x)

  def extend(self, x, cache: KVCache, offset=None, last=None):
    """Appends T tokens to every row of a cache (inference mode).

    Args:
      x: [B,T,D] embeddings.
      cache: with room for T more tokens.
      offset: [] int32, how many tokens every row has; None for none, where the
        new tokens see each other only.
      last: [B] int32, the only one of the T whose hidden state is wanted: the
        last layer needs no more than keys and values of the others. None for
        all.

    Returns:
      ([B,T,D] hidden states, or [B,1,D]; the cache with the layers' new keys
      and values).

    Raises:
      ConfigError: the layers are stacked.
    """
    rows, length, _ = x.shape
    index = jnp.arange(length) + (0 if offset is None else offset)
    positions = jnp.broadcast_to(index, (rows, length))
    context = self._context(positions, cache.prompt_lengths)
    if offset is None:
      segments = jnp.ones((rows, length), jnp.int32)
      mask = causal_mask(segments, None, self.attention)
    else:
      mask = cached_mask(index[None], cache.size)
    context = context._replace(mask=mask, offset=offset)
    if last is not None:
      seen = length if offset is None else cache.size
      one = Last(last, context)
      last = one._replace(
        context=Context(
          one.take(context.cos),
          one.take(context.sin),
          None if context.logn is None else one.take(context.logn),
          cached_mask(one.take(positions), seen),
          offset,
        )
      )
    return self._through(x, cache, context, last)

  def decode(self, x, cache: KVCache):
    """Appends one token to every row of a cache (inference mode).

    Args:
      x: [B,1,D] embeddings.
      cache: rows of any `lengths` below its size.

    Returns:
      ([B,1,D] hidden states, the cache with the layers' new keys and values;
      its `lengths` are as before).

    Raises:
      ConfigError: the layers are stacked.
    """
    positions = cache.lengths[:, None]
    return self._through(
      x, cache, self._context(positions, cache.prompt_lengths)
    )

  def _through(self, x, cache: KVCache, context: Context, last=None):
    if self.scan_layers:
      raise ConfigError(
        'a cache needs layers apart: QwenVLConfig.scan_layers=False, and '
        'parameters from model.stacking.unstack_layers'
      )
    layers = []
    for block, layer in zip(self.blocks, cache.layers, strict=True):
      is_final = len(layers) == len(self.blocks) - 1
      x, layer = block(
        x, context, layer, cache.lengths, last if is_final else None
      )
      layers.append(layer)
    return self.ln_f(x), dataclasses.replace(cache, layers=tuple(layers))

  def _context(self, positions, lengths) -> Context:
    """Rotary angles and, where rows have `lengths`, NTK and LogN."""
    c = self.config
    inference = lengths is not None
    step = None
    if inference and c.dynamic_ntk:
      step = rope.ntk_step(lengths, c.seq_length)
    cos, sin = rope.rotary_angles(positions, c.head_dim, c.rope_base, step)
    logn = None
    if inference and c.logn:
      logn = rope.logn_scale(positions, c.seq_length)
    return Context(cos, sin, logn)

  def head(self, x):
    """[B,T,D] hidden states to [B,T,V] logits."""
    return self.lm_head(x)
