"""Scaled dot-product attention and the mask that the batch contract implies.

The one place where the kernel is chosen: splash attention on TPUs, which never
writes the scores to memory, plain XLA elsewhere and for what splash attention
cannot do. Softmax is float32 in both.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwenvl_jax import sharding
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.remat import ATTENTION, QUERY_KEY_VALUE, keep

_MASKED = -1e30

# Kernels: 'auto' is splash attention where it runs compiled.
KERNELS = ('auto', 'splash', 'xla')

# Splash attention works on blocks of queries and keys: multiples of a TPU's
# lanes, up to what fits its vector memory.
_LANES = 128
_BLOCK = 1024

# Queries that a CPU works on at a time, so that it leaves out the keys that all
# of them may not see; of short rows, there is too little to leave out.
_CPU_QUERIES = 128
_CPU_SHORT = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
  """Who may see whom, as the kernel in use wants it.

  Attributes:
    bias: for XLA, broadcastable to [B,N,T,S] float32: 0, or very negative where
      T may not see S. A query that may see nothing gets a mean of values, never
      NaN.
    segment_ids: for splash attention, [B,T] int32: causal, within a segment.
    kernel: 'xla' or 'splash'.
    causal: whether queries and keys are the same tokens and nobody may see a
      later one.
  """

  bias: jax.Array | None = None
  segment_ids: jax.Array | None = None
  kernel: str = dataclasses.field(default='xla', metadata={'static': True})
  causal: bool = dataclasses.field(default=False, metadata={'static': True})


def attend(q, k, v, mask: Mask = Mask()) -> jax.Array:
  """softmax(q k^T / sqrt(H) + mask) v.

  Args:
    q: [B,T,N,H].
    k: [B,S,N,H].
    v: [B,S,N,H].
    mask: what `full_mask`, `causal_mask` or `cached_mask` made.

  Returns:
    [B,T,N,H], dtype of v.
  """
  # Heads first: batched products of plain matrices, which XLA runs on a CPU
  # three times as fast as the same contraction with heads in the middle.
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  return jnp.swapaxes(attend_heads_first(q, k, v, mask), 1, 2)


def attend_heads_first(q, k, v, mask: Mask = Mask()) -> jax.Array:
  """`attend` of q [B,N,T,H], k and v [B,N,S,H]; returns [B,N,T,H]."""
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  q, k, v = (keep(x, QUERY_KEY_VALUE) for x in (q, k, v))
  if mask.kernel == 'splash':
    return _splash(q, k, v, mask.segment_ids)
  long = q.shape[2] >= _CPU_SHORT
  if mask.causal and long and sharding.platform() == 'cpu':
    return keep(_causal_blocks(q, k, v, mask.bias), ATTENTION)
  return keep(_xla(q, k, v, mask.bias), ATTENTION)


def _causal_blocks(q, k, v, bias):
  """As `_xla`, a block of queries after the other, each with what it sees."""
  length = q.shape[2]
  ends = [*range(_CPU_QUERIES, length, _CPU_QUERIES), length]
  return jnp.concatenate(
    [
      _xla(
        q[:, :, start:end],
        k[:, :, :end],
        v[:, :, :end],
        bias[:, :, start:end, :end],
      )
      for start, end in zip([0, *ends], ends)
    ],
    axis=2,
  )


def _xla(q, k, v, bias):
  """[B,N,T,H] of q, [B,N,S,H] of k and v to [B,N,T,H]."""
  scores = jnp.einsum(
    'BNTH,BNSH->BNTS', q, k, preferred_element_type=jnp.float32
  )
  if bias is not None:
    scores = scores + bias
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum('BNTS,BNSH->BNTH', weights, v)


def _splash(q, k, v, segment_ids):
  """As `_xla`; causal within segments if there are any."""
  mesh = sharding.mesh_in_use()
  if mesh is None or mesh.size == 1:
    return _splash_local(q, k, v, segment_ids)
  heads = sharding.spec(('batch', 'heads_act', None, None), q.shape, mesh)
  rows = jax.sharding.PartitionSpec(heads[0], None)
  return jax.shard_map(
    _splash_local,
    in_specs=(heads, heads, heads, rows),
    out_specs=heads,
    # What a kernel makes is not known to vary over the mesh's axes.
    check_vma=False,
  )(q, k, v, segment_ids)


def _splash_local(q, k, v, segment_ids):
  # Not at the top: commands that never attend start faster without Pallas.
  from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

  heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
  kernel = _splash_kernel(heads, queries, keys, segment_ids is not None)
  if segment_ids is None:
    return jax.vmap(kernel)(q, k, v)
  return jax.vmap(
    lambda q, k, v, s: kernel(q, k, v, segment_ids=SegmentIds(s, s))
  )(q, k, v, segment_ids)


def _block(length: int) -> int:
  """The largest block that divides a length."""
  return max(
    size
    for size in range(_LANES, min(length, _BLOCK) + 1, _LANES)
    if length % size == 0
  )


def _splash_kernel(heads: int, queries: int, keys: int, causal: bool):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  shape = (queries, keys)
  mask = (splash.CausalMask if causal else splash.FullMask)(shape)
  block_q, block_kv = _block(queries), _block(keys)
  return splash.make_splash_mha(
    splash.MultiHeadMask([mask] * heads),
    block_sizes=splash.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      use_fused_bwd_kernel=True,
    ),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=ATTENTION,
    interpret=sharding.platform() != 'tpu',
  )


def _runs_splash(kernel: str, queries: int, keys: int, branches=False) -> bool:
  """Whether splash attention does it; ConfigError if it must and cannot."""
  whole = queries % _LANES == 0 and keys % _LANES == 0
  if kernel != 'splash':
    able = whole and not branches
    return kernel == 'auto' and able and sharding.platform() == 'tpu'
  if branches:
    raise ConfigError(
      "QwenVLConfig.attention='splash' keeps segments apart, not branches: for "
      "rows with branches take 'auto' or 'xla'; if there are none, say so "
      '(NextToken.branches=0)'
    )
  if not whole:
    raise ConfigError(
      f"QwenVLConfig.attention='splash' takes multiples of {_LANES} queries "
      f"and keys, not {queries} and {keys}: take 'auto' or 'xla', or other "
      'lengths'
    )
  return True


def full_mask(queries: int, keys: int, kernel: str) -> Mask:
  """All see all.

  Args:
    queries: T.
    keys: S.
    kernel: one of `KERNELS`.

  Raises:
    ConfigError: 'splash' is asked for and cannot do it.
  """
  return Mask(kernel='splash' if _runs_splash(kernel, queries, keys) else 'xla')


def causal_mask(segment_ids, branch_ids, kernel: str) -> Mask:
  """Who may see whom in packed rows (see `Batch`).

  Args:
    segment_ids: [B,T] int32, 0 for padding.
    branch_ids: [B,T] int32, None if there are no branches.
    kernel: one of `KERNELS`.

  Raises:
    ConfigError: 'splash' is asked for and cannot do it.
  """
  length = segment_ids.shape[1]
  if _runs_splash(kernel, length, length, branch_ids is not None):
    return Mask(segment_ids=segment_ids, kernel='splash')
  seen = _causal(jnp.arange(length), segment_ids, segment_ids)
  if branch_ids is not None:
    prefix = (branch_ids == 0)[:, None, :]
    seen &= prefix | (branch_ids[:, :, None] == branch_ids[:, None, :])
  return Mask(bias=_bias(seen), causal=True)


def cached_mask(index, size: int) -> Mask:
  """Which of a cache's indices new tokens may see: all up to their own.

  Args:
    index: [B,T] int32, where in the cache the new tokens are; B is 1 where that
      is the same in all rows.
    size: S, of the cache.
  """
  return Mask(bias=_bias(jnp.arange(size) <= index[..., None]))


def _causal(query_index, query_segments, key_segments):
  """[B,T,S] bool: not later, in the same segment, no padding."""
  causal = jnp.arange(key_segments.shape[1])[None, :] <= query_index[:, None]
  same = query_segments[:, :, None] == key_segments[:, None, :]
  return causal[None] & same & (key_segments > 0)[:, None, :]


def _bias(seen):
  return jnp.where(seen, 0.0, _MASKED)[:, None]
