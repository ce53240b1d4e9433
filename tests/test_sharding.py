import pathlib

import flax.linen as nn
import jax
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.sharding import MeshConfig, make_mesh, param_shardings


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
  ],
)
def test_meshes_that_do_not_fit_say_what_would(config, devices, said):
  with pytest.raises(ConfigError, match=said):
    config.sizes(devices)


def test_an_axis_without_a_rule_is_a_bug():
  leaf = nn.LogicallyPartitioned(jax.ShapeDtypeStruct((4,), 'float32'), ('x',))
  with pytest.raises(KeyError, match="'x' is not in sharding.RULES"):
    param_shardings({'a': leaf}, make_mesh())


SHARDED = """
import os, sys
# Compiling is most of the time here.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
sys.path.insert(0, {here!r})
import jax, numpy as np, standin
from qwenvl_jax.sharding import MeshConfig, make_mesh, put_batch
from qwenvl_jax.train import init, objective, optimizer, state, step

model = objective.NextToken(standin.small_config())
config = optimizer.OptimizerConfig(1e-3, 1e-4, 1, 10, vision_layer_decay=0.9)

def run(mesh):
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
  return begun, s, np.array(metrics)

alone = run(make_mesh(MeshConfig(), jax.devices()[:1]))
for sizes in ((2, 2, 2), (1, 4, 2)):
  together = run(make_mesh(MeshConfig(*sizes)))
  for a, b in zip(jax.tree.leaves(alone[0]), jax.tree.leaves(together[0])):
    np.testing.assert_array_equal(a, b)  # Random numbers know no mesh.
  np.testing.assert_allclose(
    alone[2], together[2], rtol=1e-4, err_msg=str(sizes)
  )
  def kernel(tree):
    return tree['decoder']['blocks']['mlp']['up']['kernel'].sharding
  assert not kernel(together[1].trained).is_fully_replicated
  assert kernel(together[1].opt_state[1].mu) == kernel(together[1].trained)
"""


@pytest.mark.slow
def test_a_sharded_step_is_the_step_of_one_device(run_on_devices):
  here = str(pathlib.Path(__file__).parent / 'train')
  run_on_devices(8, SHARDED.format(here=here))
