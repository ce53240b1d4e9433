"""Attention of one new token a row to its cache, which takes the token in.

The one place that chooses how: a kernel on TPUs, a loop over rows on CPUs,
products over the whole cache elsewhere. In each, what a row gets depends on
this row alone, bit by bit: a request is answered the same whoever is served
beside it. Softmax is float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qwenvl_jax import sharding
from qwenvl_jax.model.cache import LayerCache, dequantize, quantize, read

_MASKED = -1e30

# Positions that a CPU works on at a time: few enough that keys and values stay
# in its cache between being copied out and multiplied.
_CPU_BLOCK = 32


def decode_attention(
  q, k, v, cache: LayerCache, lengths
) -> tuple[jax.Array, LayerCache]:
  """Appends one token to every row and attends to all tokens so far.

  Args:
    q: [B,N,H], rotated.
    k: [B,N,H], rotated.
    v: [B,N,H].
    cache: of one layer; updated in place where it is donated.
    lengths: [B] int32, tokens of each row in the cache, less than S: the new
      token goes to this index.

  Returns:
    ([B,N,H] in the dtype of q, the new cache).
  """
  mesh = sharding.mesh_in_use()
  if mesh is None or mesh.size == 1:
    return _local(q, k, v, cache, lengths)
  names = ('batch', 'heads_act', None, None)
  rows, heads, *_ = sharding.spec(names, cache.keys.shape, mesh)
  split = PartitionSpec(rows, heads)
  caches = jax.tree.map(lambda _: split, cache)
  return jax.shard_map(
    _local,
    in_specs=(split, split, split, caches, PartitionSpec(rows)),
    out_specs=(split, caches),
    # What a kernel makes is not known to vary over the mesh's axes.
    check_vma=False,
  )(q, k, v, cache, lengths)


def _local(q, k, v, cache, lengths):
  """On one device."""
  new = stored(k, v, cache)
  device = sharding.platform()
  if device == 'tpu':
    # Not at the top: commands that never attend start faster without Pallas.
    from qwenvl_jax.model import decode_kernel

    _, heads, size, head_dim = cache.keys.shape
    itemsize = cache.keys.dtype.itemsize
    if decode_kernel.block_size(heads, size, head_dim, itemsize):
      out, cache = decode_kernel.append_and_attend(q, new, cache, lengths)
      return out, LayerCache(*cache)
  cache = append(cache, new, lengths)
  attend = _by_rows if device == 'cpu' else _whole
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  return attend(q, cache, lengths).astype(q.dtype), cache


def stored(k, v, cache: LayerCache) -> LayerCache:
  """Tokens as a cache holds them.

  Args:
    k: [...,H] rotated keys.
    v: [...,H].
    cache: whose dtypes are wanted.
  """
  if cache.key_scales is None:
    return LayerCache(k.astype(cache.keys.dtype), v.astype(cache.values.dtype))
  (k, k_scales), (v, v_scales) = quantize(k), quantize(v)
  return LayerCache(k, v, k_scales, v_scales)


def append(cache: LayerCache, new: LayerCache, lengths) -> LayerCache:
  """Writes one token of each row at its own index.

  Args:
    cache: of one layer.
    new: [B,N,H] keys and values as the cache holds them, [B,N] scales.
    lengths: [B] int32.
  """

  def put(old, part):
    if old is None:
      return None

    def one(old, part, index):
      start = (0, index, 0)[: old.ndim]
      return lax.dynamic_update_slice(old, part[:, None], start)

    return jax.vmap(one)(old, part, lengths)

  return LayerCache(*map(put, cache, new))


def _whole(q, cache, lengths):
  """Attends to the whole cache, masked; [B,N,H] float32."""
  keys, values = read(cache, q.dtype)
  scores = jnp.einsum(
    'BNH,BNSH->BNS', q, keys, preferred_element_type=jnp.float32
  )
  seen = jnp.arange(keys.shape[2])[None, :] <= lengths[:, None]
  weights = jax.nn.softmax(jnp.where(seen[:, None], scores, _MASKED), axis=-1)
  return jnp.einsum(
    'BNS,BNSH->BNH',
    weights.astype(values.dtype),
    values,
    preferred_element_type=jnp.float32,
  )


def _by_rows(q, cache, lengths):
  """Row by row and block by block, each row as far as it is filled.

  [B,N,H] float32.
  """
  size = cache.keys.shape[2]
  block = next(n for n in range(min(_CPU_BLOCK, size), 0, -1) if size % n == 0)

  def part(x, row, index):
    """[N,block,...] of an array of the cache."""
    start = (row, 0, index * block, 0)[: x.ndim]
    shape = (1, x.shape[1], block, *x.shape[3:])
    return lax.dynamic_slice(x, start, shape)[0]

  def of_row(row, out):
    query, length = q[row].astype(jnp.float32), lengths[row]

    def add(index, carry):
      highest, total, weighted = carry
      keys, values = (
        dequantize(part(x, row, index), part(scales, row, index), jnp.float32)
        if scales is not None
        else part(x, row, index).astype(jnp.float32)
        for x, scales in zip(cache[:2], cache[2:])
      )
      scores = jnp.einsum('NH,NSH->NS', query, keys)
      seen = (index * block + jnp.arange(block) <= length)[None]
      scores = jnp.where(seen, scores, _MASKED)
      now = jnp.maximum(highest, jnp.max(scores, axis=-1))
      weights = jnp.where(seen, jnp.exp(scores - now[:, None]), 0.0)
      kept = jnp.exp(highest - now)
      return (
        now,
        total * kept + jnp.sum(weights, axis=-1),
        weighted * kept[:, None] + jnp.einsum('NS,NSH->NH', weights, values),
      )

    _, heads, head_dim = q.shape
    start = (
      jnp.full(heads, _MASKED),
      jnp.zeros(heads),
      jnp.zeros((heads, head_dim)),
    )
    blocks = jnp.minimum(length, size - 1) // block + 1
    _, total, weighted = lax.fori_loop(0, blocks, add, start)
    return out.at[row].set(weighted / total[:, None])

  return lax.fori_loop(0, q.shape[0], of_row, jnp.zeros(q.shape))
