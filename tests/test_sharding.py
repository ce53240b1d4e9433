import itertools
import math
import pathlib

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


SHARDED = """
import os, sys
# Compiling is most of the time here.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
sys.path.insert(0, {here!r})
import jax, numpy as np, standin
from qwenvl_jax.model.attention import attend, causal_mask
from qwenvl_jax.sharding import MeshConfig, make_mesh, put_batch, use_mesh
from qwenvl_jax.train import init, objective, optimizer, state, step

def run(mesh, trainable, remat='none'):
  model = objective.NextToken(standin.small_config(remat=remat))
  decay = 0.9 if 'vision/.*' in trainable or '.*' in trainable else None
  config = optimizer.OptimizerConfig(
    1e-3, 1e-4, 1, 10, vision_layer_decay=decay, trainable=trainable
  )
  target = state.abstract_params(model, config, mesh)
  params = init.initial_params(model, target, init.InitFrom(), 0)
  begun = jax.device_get(params)
  s = state.create_state(params, config, mesh)
  where = jax.tree.map(lambda x: x.sharding, s)
  f = step.compile_step(model, config, 2, mesh, s)
  metrics = []
  for k in range(2):
    s, m = f(s, put_batch(standin.rows(k, 16), mesh))
    metrics.append((float(m['loss']), float(m['grad_norm'])))
  assert jax.tree.map(lambda x: x.sharding, s) == where
  for path, x in jax.tree_util.tree_leaves_with_path(s.trained):
    if 'blocks' in str(path) and path[-1].key == 'kernel' and mesh.size > 1:
      assert not x.sharding.is_fully_replicated, path
  places = jax.tree.leaves(where.trained)
  assert jax.tree.leaves(where.opt_state[1].mu) == places
  return begun, np.array(metrics), jax.device_get(s.opt_state[1].mu)

def attention():
  # Each device runs the kernel on its own rows and heads.
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 4, 128, 2, 8)).astype(np.float32)
  segments = np.repeat([[1, 2]], 64, axis=1).repeat(4, axis=0)
  def out(kernel):
    return attend(q, k, v, causal_mask(segments, None, kernel))
  with use_mesh(make_mesh(MeshConfig(2, 2, 2))):
    np.testing.assert_allclose(
      jax.jit(out, static_argnums=0)('splash'), out('xla'), atol=2e-5
    )

attention()
STAGES = {{
  1: ('vision/.*', 'adapter/.*'), 2: ('.*',), 3: ('adapter/.*', 'decoder/.*'),
}}
for stage, meshes in (
  (2, ((2, 2, 2, 1),)), (1, ((1, 8, 1, 2),)), (3, ((1, 4, 2, 2),))
):
  alone = run(make_mesh(MeshConfig(), jax.devices()[:1]), STAGES[stage])
  for sizes in meshes:
    mesh = make_mesh(MeshConfig(*sizes))
    remat = 'products' if sizes[1] == 4 else 'none'
    together = run(mesh, STAGES[stage], remat)
    for a, b in zip(jax.tree.leaves(alone[0]), jax.tree.leaves(together[0])):
      np.testing.assert_array_equal(a, b)  # Random numbers know no mesh.
    np.testing.assert_allclose(
      alone[1], together[1], rtol=1e-4, err_msg=str((stage, sizes))
    )
    # The mean of the gradients. Some are zero but for rounding: a bias on all
    # keys changes nothing.
    leaves = [jax.tree.leaves(x) for x in (alone[2], together[2])]
    floor = 1e-3 * max(np.abs(a).max() for a in leaves[0])
    for a, b in zip(*leaves):
      scale = max(np.abs(a).max(), floor)
      assert np.abs(a - b).max() < 2e-4 * scale, (stage, sizes, a.shape)
    with use_mesh(mesh):
      jax.eval_shape(
        objective.NextToken(standin.small_config()).init, jax.random.key(0)
      )
"""


@pytest.mark.slow
def test_a_sharded_step_is_the_step_of_one_device(run_on_devices):
  here = str(pathlib.Path(__file__).parent / 'train')
  run_on_devices(8, SHARDED.format(here=here))
