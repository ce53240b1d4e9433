"""Twenty steps as torch's AdamW takes them, in every stage's freezing.

Tolerances are those of the goldens' README; only they catch a wrong decay.
"""

import dataclasses
import json

import golden
import jax
import numpy as np
import pytest

from qwenvl_jax.conversion import layout
from qwenvl_jax.sharding import make_mesh, put_batch
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import OptimizerConfig, flatten
from qwenvl_jax.train.state import abstract_params, create_state
from qwenvl_jax.train.step import compile_step

STAGES = {
  'stage1': {'trainable': ('vision/.*', 'adapter/.*')},
  'stage2': {'trainable': ('.*',)},
  'stage3': {'trainable': ('adapter/.*', 'decoder/.*')},
}


def run(stage):
  """(metrics of every step, last parameters) of one stage."""
  steps = json.loads((golden.FOLDER / 'trajectory.json').read_text())[stage]
  config = OptimizerConfig(
    peak=steps['peak'],
    end=steps['end'],
    warmup=steps['warmup'],
    steps=steps['steps'],
    vision_layer_decay=None if stage == 'stage3' else 0.95,
    **STAGES[stage],
  )
  objective, mesh = NextToken(golden.config()), make_mesh()
  target = abstract_params(objective, config, mesh)
  params = jax.tree.map(
    lambda x, t: jax.device_put(np.array(x), t.sharding),
    golden.params(),
    target,
  )
  state = create_state(params, config, mesh)
  step = compile_step(objective, config, 1, mesh, state)
  made = golden.train_batch()
  fields = [field.name for field in dataclasses.fields(made)]
  batch = put_batch({name: getattr(made, name) for name in fields}, mesh)
  metrics = []
  for _ in range(steps['steps']):
    state, m = step(state, batch)
    metrics.append(jax.device_get(m))
  return steps, metrics, state


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_the_same_twenty_steps_as_torch(stage):
  wanted, metrics, state = run(stage)
  for name, tolerance in (('loss', 2e-5), ('grad_norm', 1e-4)):
    got = [float(m[name]) for m in metrics]
    np.testing.assert_allclose(got, wanted[name], rtol=tolerance, err_msg=name)

  params = jax.device_get(state.params)
  norms = {
    name: np.linalg.norm(np.float64(array).ravel())
    for name, array in golden.released_tensors(
      layout.rules(golden.config()), params
    ).items()
  }
  assert norms.keys() == wanted['final_norms'].keys()
  for name, norm in wanted['final_norms'].items():
    np.testing.assert_allclose(norms[name], norm, rtol=1e-5, err_msg=name)

  # As many released tensors trained as torch had, and no others changed.
  before = flatten(golden.params())
  changed = {
    path for path, x in flatten(params).items() if (x != before[path]).any()
  }
  assert changed == set(flatten(state.trained))
