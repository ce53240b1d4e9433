"""Attention of one new token a row to its cache, as a kernel for TPUs.

Time goes into reading the cache, so each block of keys and values is read once,
nothing is read past the end of a row, and the new token's key and value are
written on the way: into the block that is there anyway, of which only the
memory tile that holds the new token goes back.

The grid is a list of (row, block) pairs, made from the rows' lengths: the next
block is under way while one is worked on, also from row to row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_MASKED = -1e30

# Bytes of keys in a block, and its positions. Smaller blocks transfer slower,
# larger ones read more past the end of a row.
_BLOCK_BYTES = 2**20
_LANES = 128
_MAX_BLOCK = 1024

# Positions in a memory tile of keys or values, by their bytes.
_TILES = {4: 8, 2: 16, 1: 32}


def block_size(heads: int, size: int, head_dim: int, itemsize: int) -> int:
  """Positions in a block of a cache [B,N,S,H]; 0 if the kernel cannot do it.

  Args:
    heads: N of one chip.
    size: S.
    head_dim: H.
    itemsize: bytes of a key's element.
  """
  if head_dim % _LANES or itemsize not in _TILES:
    return 0
  fitting = [
    block
    for block in range(_LANES, min(size, _MAX_BLOCK) + 1, _LANES)
    if size % block == 0 and heads * block * head_dim * itemsize <= _BLOCK_BYTES
  ]
  return max(fitting, default=_LANES if size % _LANES == 0 else 0)


def append_and_attend(q, new, cache, lengths, interpret: bool = False):
  """Writes one token of each row into the cache and attends to all so far.

  Args:
    q: [B,N,H] in the dtype of the products.
    new: (k, v, key scales, value scales) of the new tokens as the cache holds
      them: [B,N,H] twice and [B,N] float32 twice, these None unless int8.
    cache: (keys, values, key scales, value scales): [B,N,S,H] twice and [B,N,S]
      float32 twice, these None unless int8. Given up where it is donated.
    lengths: [B] int32, tokens of each row so far, less than S.
    interpret: run without a TPU, slowly.

  Returns:
    ([B,N,H] in the dtype of q, the new cache).
  """
  rows, heads, size, head_dim = cache[0].shape
  dtype = cache[0].dtype
  block = block_size(heads, size, head_dim, dtype.itemsize)
  # A chip of two cores gives each of them one group of rows.
  groups = 2 if rows % 2 == 0 else 1
  steps, schedule = _schedule(lengths, block, size, groups)
  tile = _TILES[dtype.itemsize]
  per_group = schedule[0].shape[0] // groups

  def step(group, i, lengths, step_rows, step_blocks):
    """(row, block, index of the new token) of a step of the grid."""
    row = step_rows[group * per_group + i]
    last = lengths[row] // block
    wanted = step_blocks[group * per_group + i]
    return row, jax.lax.min(wanted, last), lengths[row]

  def of_row(*at):
    return step(*at)[0], 0, 0

  def of_block(*at):
    row, wanted, _ = step(*at)
    return row, 0, wanted, 0

  def of_tile(*at):
    row, _, index = step(*at)
    return row, 0, index // tile, 0

  def of_scales(*at):
    row, wanted, _ = step(*at)
    return row, 0, wanted

  def of_scale_tile(*at):
    row, _, index = step(*at)
    return row, 0, index // _LANES

  vector = pl.BlockSpec((1, heads, head_dim), of_row)
  scalar = pl.BlockSpec((1, heads, 1), of_row)
  blocks = pl.BlockSpec((1, heads, block, head_dim), of_block)
  tiles = pl.BlockSpec((1, heads, tile, head_dim), of_tile)
  quantized = cache[2] is not None
  arrays = [q, *new[:2]]
  in_specs = [vector, vector, vector]
  stored, stored_specs, out_specs = [*cache[:2]], [blocks] * 2, [tiles] * 2
  if quantized:
    arrays += [x[..., None] for x in new[2:]]
    in_specs += [scalar, scalar]
    stored += cache[2:]
    stored_specs += [pl.BlockSpec((1, heads, block), of_scales)] * 2
    out_specs += [pl.BlockSpec((1, heads, _LANES), of_scale_tile)] * 2
  first = 3 + len(arrays)
  out, *stored = pl.pallas_call(
    functools.partial(
      _kernel, heads=heads, block=block, tile=tile, per_group=per_group
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(groups, steps),
      in_specs=[*in_specs, *stored_specs],
      out_specs=[vector, *out_specs],
      scratch_shapes=[
        pltpu.VMEM((heads, _LANES), jnp.float32),
        pltpu.VMEM((heads, _LANES), jnp.float32),
        pltpu.VMEM((heads, head_dim), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in stored),
    ],
    input_output_aliases={first + i: 1 + i for i in range(len(stored))},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    interpret=interpret,
    name='decode_attention',
  )(lengths, *schedule, *arrays, *stored)
  return out, (*stored, *([] if quantized else [None, None]))


def _schedule(lengths, block: int, size: int, groups: int):
  """Which block of which row each step of the grid works on.

  Args:
    lengths: [B] int32.
    block: positions in a block.
    size: S.
    groups: rows [g * B / groups, (g + 1) * B / groups) are group g's.

  Returns:
    (steps of the longest group: [] int32, (rows, blocks)): the latter [groups *
    B / groups * S / block] int32 each. Steps past a group's end get a block
    past the last row's end.
  """
  rows = lengths.shape[0] // groups
  ends = jnp.cumsum(
    (lengths // block + 1).reshape(groups, rows), axis=1, dtype=jnp.int32
  )
  index = jnp.arange(rows * (size // block), dtype=jnp.int32)
  # Rows that ended before a step, which is the number of the row in its group.
  done = jnp.sum(ends[:, None, :] <= index[None, :, None], axis=-1)
  local = jnp.minimum(done, rows - 1).astype(jnp.int32)
  starts = jnp.concatenate([jnp.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
  blocks = index[None] - jnp.take_along_axis(starts, local, axis=1)
  row = local + rows * jnp.arange(groups, dtype=jnp.int32)[:, None]
  return jnp.max(ends), (row.reshape(-1), blocks.reshape(-1))


def _kernel(
  lengths, step_rows, step_blocks, *refs, heads, block, tile, per_group
):
  """One block of one row."""
  quantized = len(refs) > 11
  if quantized:
    q, k, v, k_scale, v_scale, keys, values, key_scales, value_scales = refs[:9]
    out, new_keys, new_values, new_key_scales, new_value_scales = refs[9:14]
  else:
    q, k, v, keys, values, out, new_keys, new_values = refs[:8]
  highest, total, weighted = refs[-3:]
  at = pl.program_id(0) * per_group + pl.program_id(1)
  length = lengths[step_rows[at]]
  number, last = step_blocks[at], length // block
  precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

  scale = q.shape[-1] ** -0.5

  @pl.when(number == 0)
  def _start():
    """From the new token, which always counts."""
    key, value = k[0].astype(jnp.float32), v[0].astype(jnp.float32)
    score = q[0].astype(jnp.float32) * key
    score = scale * jnp.sum(score, axis=1, keepdims=True)
    if quantized:
      score *= k_scale[0]
      value *= v_scale[0]
    highest[...] = jnp.broadcast_to(score, highest.shape)
    total[...] = jnp.ones_like(total)
    weighted[...] = value

  @pl.when(number <= last)
  def _block():
    scores = jnp.concatenate(
      [
        jax.lax.dot_general(
          q[0, n : n + 1],
          keys[0, n].astype(q.dtype),
          (((1,), (1,)), ((), ())),
          precision=precision,
          preferred_element_type=jnp.float32,
        )
        for n in range(heads)
      ],
      axis=0,
    )
    scores *= scale * key_scales[0] if quantized else scale
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(index < length - number * block, scores, _MASKED)
    before = highest[:, :1]
    now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - now)
    kept = jnp.exp(before - now)
    highest[...] = jnp.broadcast_to(now, highest.shape)
    total[...] = total[...] * kept + jnp.sum(weights, axis=1, keepdims=True)
    if quantized:
      weights *= value_scales[0]
    weights = weights.astype(q.dtype)
    weighted[...] = weighted[...] * kept + jnp.concatenate(
      [
        jax.lax.dot_general(
          weights[n : n + 1],
          values[0, n].astype(q.dtype),
          (((1,), (0,)), ((), ())),
          precision=precision,
          preferred_element_type=jnp.float32,
        )
        for n in range(heads)
      ],
      axis=0,
    )

  @pl.when(number == last)
  def _finish():
    out[0] = (weighted[...] / total[:, :1]).astype(out.dtype)
    place = length % block
    _put(keys, new_keys, k[0], place, tile)
    _put(values, new_values, v[0], place, tile)
    if quantized:
      _put_scale(key_scales, new_key_scales, k_scale[0], place)
      _put_scale(value_scales, new_value_scales, v_scale[0], place)


def _put(old, new, vector, place, tile):
  """Copies the tile of a block around a place, with [N,H] at that place."""
  start = pl.multiple_of(place // tile * tile, tile)
  before = old[0, :, pl.ds(start, tile), :]
  wide = jnp.int32 if before.dtype == jnp.int8 else jnp.float32
  index = jax.lax.broadcasted_iota(jnp.int32, before.shape, 1)
  after = jnp.where(
    index == place % tile,
    vector.astype(wide)[:, None, :],
    before.astype(wide),
  )
  new[0] = after.astype(new.dtype)


def _put_scale(old, new, scale, place):
  """As `_put`, for the scales of a block: [N,1] at a place."""
  start = pl.multiple_of(place // _LANES * _LANES, _LANES)
  before = old[0, :, pl.ds(start, _LANES)]
  index = jax.lax.broadcasted_iota(jnp.int32, before.shape, 1)
  new[0] = jnp.where(index == place % _LANES, scale, before)
