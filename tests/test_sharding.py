import itertools
import math

import flax.linen as nn
import jax
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.config import qwen_vl_7b
from qwenvl_jax.sharding import (
  MESH_AXES,
  MeshConfig,
  make_mesh,
  param_shardings,
  param_spec,
)
from qwenvl_jax.train.objective import NextToken


def test_sizes_of_a_mesh():
  assert MeshConfig().sizes(8) == (1, 8, 1)
  assert MeshConfig(data=-1, fsdp=2, tensor=2).sizes(8) == (2, 2, 2)
  assert MeshConfig(data=1, fsdp=1, tensor=1).sizes(1) == (1, 1, 1)


@pytest.mark.parametrize(
  ('config', 'devices', 'said'),
  [
    (MeshConfig(tensor=3), 8, r'each is one of \[1, 2, 4, 8\]'),
    (MeshConfig(data=2, fsdp=2, tensor=1), 8, 'must multiply to 8'),
    (MeshConfig(data=-1), 8, 'at most one is -1'),
    (MeshConfig(data=0), 8, 'sizes are positive'),
    (MeshConfig(fsdp=3, tensor=2), 8, r'\(data=1, fsdp=4, tensor=2\)'),
    (MeshConfig(inner=3), 8, r'fsdp=8 .* is one of \[1, 2, 4, 8\]'),
  ],
)
def test_meshes_that_do_not_fit_say_what_would(config, devices, said):
  with pytest.raises(ConfigError, match=said):
    config.sizes(devices)


def test_an_axis_without_a_rule_is_a_bug():
  leaf = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), 'float32'), ('x',))
  with pytest.raises(KeyError, match="'x' is not in sharding.RULES"):
    param_shardings({'a': leaf}, make_mesh())


def spec(shape, names, mesh=(1, 16, 16, 1)):
  mesh = jax.sharding.AbstractMesh(mesh, MESH_AXES)
  return tuple(param_spec(names, shape, mesh))


BOTH = ('fsdp', 'inner')


def test_parameters_are_split_evenly_and_where_it_costs_no_padding():
  project = ('layers', 'embed', 'heads', 'head_dim')
  back = ('layers', 'heads', 'head_dim', 'embed')
  # 4096 / 256 along one axis; the last one would be padded from 16 to 128.
  assert spec((32, 4096, 32, 128), project) == (None, BOTH, None, None)
  assert spec((32, 32, 128, 4096), back) == (
    None,
    'fsdp',
    'inner',
    None,
  )
  # 1664 does not divide by 256, but by 16, and so do 16 heads.
  assert spec((48, 1664, 16, 104), project) == (
    None,
    'fsdp',
    'inner',
    None,
  )
  # Look-ups want whole rows of the columns that a chip has.
  assert spec((151936, 4096), ('vocab_rows', 'embed')) == (
    'fsdp',
    'inner',
  )
  # Columns alone where that wastes nothing.
  table = ('vocab_rows', 'embed')
  assert spec((151936, 4096), table, (1, 4, 4, 1)) == (None, BOTH)
  # Vectors by layers: the state of those of all layers is 5% of a chip's.
  assert spec((32, 4096), ('layers', 'norm')) == ('fsdp', None)
  assert spec((48, 1664), ('layers', 'embed')) == ('fsdp', None)
  assert spec((4096,), ('norm',)) == (None,)
  # What no axis divides stays whole.
  assert spec((3, 5), ('embed', 'mlp')) == (None, None)


def test_tensor_splits_work_first():
  assert spec((32, 4096, 11008), ('layers', 'embed', 'mlp'), (1, 8, 1, 4)) == (
    None,
    'fsdp',
    'tensor',
  )


def test_all_of_the_release_is_split():
  """No chip of 256 holds more than 1.06 times its share."""
  boxed = jax.eval_shape(NextToken(qwen_vl_7b()).init, jax.random.key(0))
  mesh = jax.sharding.AbstractMesh((1, 16, 16, 1), MESH_AXES)
  whole = share = 0
  for leaf in jax.tree.leaves(
    boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  ):
    parts = param_spec(leaf.names, leaf.value.shape, mesh)
    axes = [(a,) if isinstance(a, str) else a or () for a in parts]
    ways = math.prod(mesh.shape[a] for a in itertools.chain(*axes))
    whole += leaf.value.size
    share += leaf.value.size / ways
  assert share < 1.06 * whole / 256
