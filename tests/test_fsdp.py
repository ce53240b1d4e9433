import pathlib

import pytest

SHARDED = """
import os, sys
# Compiling is most of the time here.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
sys.path.insert(0, {here!r})
import jax, numpy as np, fake
from qwenvl_jax.model.attention import attend, causal_mask
from qwenvl_jax.sharding import MeshConfig, make_mesh, put_batch, use_mesh
from qwenvl_jax.train import init, objective, optimizer, state, step

def run(mesh, trainable, remat='none'):
  model = objective.NextToken(fake.small_config(remat=remat))
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
    s, m = f(s, put_batch(fake.rows(k, 16), mesh))
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
        objective.NextToken(fake.small_config()).init, jax.random.key(0)
      )
"""


@pytest.mark.slow
def test_a_sharded_step_is_the_step_of_one_device(run_on_devices):
  here = str(pathlib.Path(__file__).parent / 'train')
  run_on_devices(8, SHARDED.format(here=here))
