"""One new token a row: kernel, loop over rows and plain attention agree."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.model import decode_attention as da
from qwenvl_jax.model import decode_kernel
from qwenvl_jax.model.cache import LayerCache, dequantize, quantize

TOLERANCE = {'float32': 2e-6, 'bfloat16': 8e-3, 'int8': 2e-6}


def case(kind, lengths, size, heads=2, head_dim=128):
  """(q, k, v, cache, lengths); what lies past a row's end is large."""
  shape = len(lengths), heads, size, head_dim
  keys = jax.random.split(jax.random.key(0), 5)
  dtype = 'float32' if kind == 'int8' else kind
  q, k, v = (jax.random.normal(x, (*shape[:2], head_dim)) for x in keys[:3])
  filled = jnp.arange(size) < jnp.asarray(lengths)[:, None]
  stored = [
    jnp.where(filled[:, None, :, None], jax.random.normal(x, shape), 1e4)
    for x in keys[3:]
  ]
  if kind == 'int8':
    (a, a_scales), (b, b_scales) = map(quantize, stored)
    cache = LayerCache(a, b, a_scales, b_scales)
  else:
    cache = LayerCache(*(x.astype(dtype) for x in stored))
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  return q, k, v, cache, jnp.asarray(lengths, jnp.int32)


def plainly(q, k, v, cache, lengths):
  """(out [B,N,H], values of the cache) by NumPy in float64, row by row."""
  keys, values = cache[:2]
  if cache.key_scales is not None:
    keys = dequantize(keys, cache.key_scales, jnp.float32)
    values = dequantize(values, cache.value_scales, jnp.float32)
    k, v = (dequantize(*quantize(x), jnp.float32) for x in (k, v))
  q, k, v, keys, values = (
    np.array(x, np.float64) for x in (q, k, v, keys, values)
  )
  out = np.zeros(q.shape)
  for row, length in enumerate(np.asarray(lengths)):
    keys[row, :, length], values[row, :, length] = k[row], v[row]
    scores = np.einsum('NH,NSH->NS', q[row], keys[row, :, : length + 1])
    weights = np.exp(scores / np.sqrt(q.shape[-1]))
    weights /= weights.sum(axis=-1, keepdims=True)
    out[row] = np.einsum('NS,NSH->NH', weights, values[row, :, : length + 1])
  return out


@jax.jit
def by_kernel(q, k, v, cache, lengths):
  new = da.stored(k, v, cache)
  out, cache = decode_kernel.append_and_attend(
    q, new, cache, lengths, interpret=True
  )
  return out, LayerCache(*cache)


by_rows = jax.jit(da.decode_attention)


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('size', [256, 384])
def test_kernel_equals_xla(kind, size, monkeypatch):
  """Rows that end before, on and after an edge of a block, and at both ends."""
  monkeypatch.setattr(decode_kernel, '_MAX_BLOCK', 128)
  given = case(kind, [0, 127, 128, 200, size - 1, 1], size)
  expected = plainly(*given)
  for run in (by_kernel, by_rows):
    out, cache = run(*given)
    np.testing.assert_allclose(
      np.asarray(out, np.float64), expected, atol=TOLERANCE[kind]
    )
    for old, part, after in zip(given[3], da.stored(*given[1:4]), cache):
      if old is not None:
        wanted = np.array(old)
        rows = np.arange(len(wanted))
        wanted[rows, :, given[-1]] = part
        np.testing.assert_array_equal(after, wanted)


@pytest.mark.parametrize('run', [by_kernel, by_rows])
@pytest.mark.parametrize('kind', ['float32', 'int8'])
def test_a_row_does_not_depend_on_its_neighbours(run, kind):
  """Bit by bit, though they are longer, shorter or hold something else."""
  q, k, v, cache, lengths = case(kind, [255, 3, 131, 77], 256)
  alone = [run(q[2:3], k[2:3], v[2:3], *jax.tree.map(
    lambda x: x[2:3], (cache, lengths)
  ))]  # fmt: skip
  changed = jax.tree.map(lambda x: x[::-1] * 2, (q, k, v, cache))
  others = jax.tree.map(
    lambda a, b: a.at[2].set(b[2]), changed, (q, k, v, cache)
  )
  for arrays in ((q, k, v, cache), others):
    together = run(*arrays, jnp.asarray([9, 200, 131, 0], jnp.int32))
    assert_same(alone[0], jax.tree.map(lambda x: x[2:3], together))


@pytest.mark.parametrize('kind', ['float32', 'int8'])
def test_the_cache_is_updated_in_place(kind):
  given = case(kind, [5, 100, 30], 256, head_dim=64)
  run = jax.jit(da.decode_attention, donate_argnums=3)
  compiled = run.lower(*given).compile()
  size = sum(x.nbytes for x in jax.tree.leaves(given[3]))
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= size
  assert memory.temp_size_in_bytes < size / 3


def test_split_over_a_mesh_is_the_same(run_on_devices):
  run_on_devices(
    8,
    """
import jax, jax.numpy as jnp, numpy as np
from qwenvl_jax.model.cache import LayerCache
from qwenvl_jax.model.decode_attention import decode_attention
from qwenvl_jax.sharding import MeshConfig, make_mesh, use_mesh

keys = jax.random.split(jax.random.key(0), 5)
q, k, v = (jax.random.normal(x, (4, 4, 64)) for x in keys[:3])
cache = LayerCache(*(jax.random.normal(x, (4, 4, 64, 64)) for x in keys[3:]))
lengths = jnp.asarray([0, 63, 20, 31])
arrays = q, k, v, cache, lengths
alone = jax.jit(decode_attention)(*arrays)
with use_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))):
  split = jax.jit(decode_attention)(*arrays)
jax.tree.map(np.testing.assert_array_equal, alone, split)
assert split[1].keys.sharding.shard_shape((4, 4, 64, 64)) == (2, 1, 64, 64)
""",
  )


@pytest.mark.parametrize(
  ('heads', 'size', 'head_dim', 'itemsize', 'block'),
  [
    (4, 2048, 128, 2, 1024),
    (32, 2048, 128, 2, 128),
    (32, 8192, 128, 4, 128),
    (4, 384, 128, 1, 384),
    (4, 2048, 64, 2, 0),
    (4, 100, 128, 2, 0),
  ],
)
def test_blocks(heads, size, head_dim, itemsize, block):
  assert decode_kernel.block_size(heads, size, head_dim, itemsize) == block


@pytest.mark.parametrize('name', ['v5e:2x2', 'v5p:2x2x1'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_compiles_for_pods_without_a_second_cache(name, dtype):
  if not importlib.util.find_spec('libtpu'):
    pytest.skip('needs libtpu')
  from jax.sharding import NamedSharding, PartitionSpec

  from qwenvl_jax.plan import topology
  from qwenvl_jax.sharding import MeshConfig, make_mesh, use_mesh

  devices = topology.devices(topology.parse(name))
  mesh = make_mesh(MeshConfig(fsdp=1, tensor=4), devices)
  split = NamedSharding(mesh, PartitionSpec(None, 'tensor'))
  whole = NamedSharding(mesh, PartitionSpec())

  def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

  stored = abstract((6, 16, 512, 128), dtype)
  scales = abstract((6, 16, 512), 'float32') if dtype == 'int8' else None
  cache = LayerCache(stored, stored, scales, scales)
  compute = 'bfloat16' if dtype == 'int8' else dtype
  vectors = [abstract((6, 16, 128), compute)] * 3
  lengths = jax.ShapeDtypeStruct((6,), 'int32', sharding=whole)
  with use_mesh(mesh):
    lowered = jax.jit(da.decode_attention, donate_argnums=3).lower(
      *vectors, cache, lengths
    )
  compiled = lowered.compile()
  assert 'decode_attention' in compiled.as_text()
  memory = compiled.memory_analysis()
  assert (
    memory.alias_size_in_bytes >= 2 * stored.size * stored.dtype.itemsize / 4
  )
  assert memory.temp_size_in_bytes < 2**20
