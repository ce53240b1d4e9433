"""Qwen-7B decoder.

Released source: `modeling_qwen.py` (QWenModel). One scanned block serves
training, prefill and decoding; the cache rides along as the scan's carry so
that it is updated in place.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.fsdp import take_rows
from qwenvl_jax.model import rope
from qwenvl_jax.model.attention import attend, cached_mask, causal_mask
from qwenvl_jax.model.cache import KVCache
from qwenvl_jax.model.config import DecoderConfig
from qwenvl_jax.model.layers import Projection, RMSNorm
from qwenvl_jax.model.remat import GATE, RESIDUAL, UP, keep, remat
from qwenvl_jax.sharding import constrain

# A random decoder only ever stands in for the released one. With its 0.02 a
# token's identity would drown in what the first blocks add to it.
_embed_init = nn.initializers.normal(0.5)


class SelfAttention(nn.Module):
  """Causal attention with rotary positions; optionally through the cache."""

  config: DecoderConfig
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x, store, layer, context):
    c = self.config
    kinds = {
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
      'int4_group': c.int4_group,
    }

    def project(name):
      return Projection(
        'BTD,DNH->BTNH',
        (c.dim, c.heads, c.head_dim),
        ('embed', 'heads', 'head_dim'),
        2,
        **kinds,
        name=name,
      )(x)

    q = rope.rotate(project('q'), context['cos'], context['sin'])
    k = rope.rotate(project('k'), context['cos'], context['sin'])
    v = project('v')
    if context['logn'] is not None:
      q = (q * context['logn']).astype(self.dtype)
    if store is not None:
      store, k, v = _update(store, k, v, layer, context['used'])
    out = attend(q, k, v, context['mask'])
    out = Projection(
      'BTNH,NHD->BTD',
      (c.heads, c.head_dim, c.dim),
      ('heads', 'head_dim', 'embed'),
      **kinds,
      name='out',
    )(out)
    return out, store


def _update(store, k, v, layer, used):
  """Writes k and v [B,T,N,H] into layer's slots; returns all its slots."""
  start = (layer, 0, used, 0, 0)
  store = tuple(
    jax.lax.dynamic_update_slice(whole, part[None].astype(whole.dtype), start)
    for whole, part in zip(store, (k, v), strict=True)
  )
  k, v = (
    jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)
    for whole in store
  )
  return store, k, v


class Mlp(nn.Module):
  """Gated MLP. In the release's names up is w1 and the gate is w2."""

  config: DecoderConfig
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x):
    c = self.config
    kinds = {
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
      'int4_group': c.int4_group,
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
  """Pre-norm transformer block; the scan's body."""

  config: DecoderConfig
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, carry, layer, context):
    x, store = carry
    c = self.config
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    h = RMSNorm(c.norm_eps, self.param_dtype, name='ln_1')(x)
    h, store = SelfAttention(c, **kinds, name='attn')(h, store, layer, context)
    x = keep(x + h, RESIDUAL)
    h = RMSNorm(c.norm_eps, self.param_dtype, name='ln_2')(x)
    x = x + Mlp(c, **kinds, name='mlp')(h)
    return (constrain(x, 'batch', 'length', 'embed_act'), store), None


class Decoder(nn.Module):
  """Token embeddings, blocks and head, called one after the other."""

  config: DecoderConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = 'none'
  unroll: int = 1
  attention: str = 'auto'

  def setup(self):
    c = self.config
    kinds = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    self.embed_table = self.param(
      'embed',
      nn.with_logical_partitioning(_embed_init, ('vocab_rows', 'embed')),
      (c.vocab_size, c.dim),
      self.param_dtype,
    )
    self.blocks = nn.scan(
      remat(Block, self.remat),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=c.layers,
      unroll=self.unroll,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c, **kinds)
    self.ln_f = RMSNorm(c.norm_eps, self.param_dtype)
    self.lm_head = Projection(
      'BTD,DV->BTV', (c.dim, c.vocab_size), ('embed', 'vocab'), **kinds
    )

  def embed_tokens(self, tokens):
    """[B,T] int32 to [B,T,D]."""
    return take_rows(
      self.embed_table, ('vocab_rows', 'embed'), tokens, self.dtype
    )

  def __call__(
    self,
    x,
    positions,
    segment_ids,
    branch_ids=None,
    *,
    inference: bool = False,
    cache: KVCache | None = None,
  ):
    """Runs the blocks and the final norm.

    Args:
      x: [B,T,D] embeddings.
      positions: [B,T] int32.
      segment_ids: [B,T] int32, 0 for padding.
      branch_ids: [B,T] int32, None if there are no branches.
      inference: dynamic NTK and LogN for rows past `seq_length`.
      cache: if given, the tokens are appended to it and attend to all of it.

    Returns:
      ([B,T,D] hidden states, the new cache or None).
    """
    c = self.config
    step = None
    if inference and c.dynamic_ntk:
      lengths = (
        jnp.max(jnp.where(segment_ids > 0, positions + 1, 0), axis=1)
        if cache is None
        else cache.prompt_lengths
      )
      step = rope.ntk_step(lengths, c.seq_length)
    cos, sin = rope.rotary_angles(positions, c.head_dim, c.rope_base, step)
    if cache is None:
      store, used = None, None
      mask = causal_mask(segment_ids, branch_ids, self.attention)
    else:
      store, used = (cache.keys, cache.values), cache.used
      filled = jax.lax.dynamic_update_slice(
        cache.segment_ids, segment_ids, (0, used)
      )
      mask = cached_mask(segment_ids, filled, used)
    context = {
      'cos': cos,
      'sin': sin,
      'logn': (
        rope.logn_scale(positions, c.seq_length)
        if inference and c.logn
        else None
      ),
      'mask': mask,
      'used': used,
    }
    (x, store), _ = self.blocks((x, store), jnp.arange(c.layers), context)
    x = self.ln_f(x)
    if cache is not None:
      cache = KVCache(
        keys=store[0],
        values=store[1],
        segment_ids=filled,
        used=used + segment_ids.shape[1],
        prompt_lengths=cache.prompt_lengths,
      )
    return x, cache

  def head(self, x):
    """[B,T,D] hidden states to [B,T,V] logits."""
    return self.lm_head(x)
