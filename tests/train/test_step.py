import fake
import jax
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.sharding import make_mesh, put_batch
from qwenvl_jax.train.objective import NO_LABEL, PatchObjects
from qwenvl_jax.train.state import abstract_params, create_state, random_params
from qwenvl_jax.train.step import check_batch, compile_step

MESH = make_mesh()


def begin(config):
  objective = config.objective
  target = abstract_params(objective, config.optimizer, MESH)
  params = random_params(objective, target, 0)
  state = create_state(params, config.optimizer, MESH)
  step = compile_step(
    objective, config.optimizer, config.accumulation, MESH, state
  )
  return state, step


def run(config, batches):
  """(last state, metrics of every step), on the host."""
  state, step = begin(config)
  metrics = []
  for batch in batches:
    state, m = step(state, put_batch(batch, MESH))
    metrics.append(jax.device_get(m))
  return jax.device_get(state), metrics


def batches(count, **changes):
  iterator = fake.Points(**changes).iterator()
  return [next(iterator) for _ in range(count)]


def test_accumulation_changes_nothing():
  made = batches(5)
  # Weights differ, so that a mean over microbatches' means would be wrong.
  assert len({batch['weight'][::4].sum() for batch in made}) > 1
  once, m1 = run(fake.line_run(), made)
  many, m4 = run(fake.line_run(accumulation=4), made)
  for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(many)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  for a, b in zip(m1, m4):
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
    assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-5)
    assert a['weight'] == b['weight'] and a['tokens'] == b['tokens']


def test_first_update_by_hand():
  """Adam's first step is the learning rate's size, against the gradient."""
  config = fake.line_run(optimizer={'warmup': 0, 'weight_decay': 0.0})
  before, step = begin(config)
  bias = np.asarray(before.trained['model']['bias'])
  after, metrics = step(before, put_batch(batches(1)[0], MESH))
  moved = np.asarray(after.trained['model']['bias']) - bias
  np.testing.assert_allclose(np.abs(moved), 0.1, rtol=1e-3)
  assert float(metrics['learning_rate']) == pytest.approx(0.1)


def test_frozen_parameters_stay():
  config = fake.line_run()
  state, _ = run(config, batches(3))
  np.testing.assert_array_equal(state.frozen['fixed']['scale'], np.ones(2))


@pytest.mark.parametrize('spoiled', ['loss', 'weight'])
def test_a_step_that_is_not_finite_is_skipped_and_counted(spoiled):
  good = batches(4)
  bad = dict(good[0])
  if spoiled == 'loss':
    bad['y'] = bad['y'] * np.inf
  else:  # Nothing to learn from: 0/0.
    bad['weight'] = bad['weight'] * 0
  config = fake.line_run()
  wanted, m = run(config, good)
  got, n = run(config, [good[0], bad, bad, *good[1:]])
  for name in ('trained', 'opt_state'):
    for a, b in zip(
      jax.tree.leaves(getattr(wanted, name)),
      jax.tree.leaves(getattr(got, name)),
    ):
      np.testing.assert_array_equal(a, b)
  # The schedule did not move on either.
  rates = [float(x['learning_rate']) for x in m]
  assert [float(n[k]['learning_rate']) for k in (0, 3, 4, 5)] == rates
  assert [int(x['skipped_in_a_row']) for x in n] == [0, 1, 2, 0, 0, 0]
  assert int(got.skipped) == 2 and int(got.step) == 6


@pytest.mark.parametrize(
  ('rows', 'accumulation', 'said'),
  [
    (30, 4, r'accumulation may be one of \[1, 2, 3, 5, 6, 10, 15, 30\]'),
    (8, 0, 'at least 1'),
    (6, 4, 'or the batch 4 or 8'),
  ],
)
def test_impossible_splits_say_what_is_possible(rows, accumulation, said):
  with pytest.raises(ConfigError, match=said):
    check_batch(rows, accumulation, MESH)


def test_patch_objects_learn_and_leave_a_vision_tree():
  model = fake.small_config()
  config = fake.line_run(
    optimizer={'peak': 1e-2, 'end': 1e-3, 'trainable': ('.*',)}, steps=40
  )
  objective = PatchObjects(model, classes=2, lines=11)
  target = abstract_params(objective, config.optimizer, MESH)
  assert set(target) == {'vision', 'head'}
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, (8, 2, 2), dtype=np.int32)
  colours = (255 * labels).repeat(14, 1).repeat(14, 2)[..., None]
  pixels = np.broadcast_to(colours, (8, 28, 28, 3)).astype(np.uint8)
  boxes = np.stack([labels * x for x in (0.1, 0.2, 0.6, 0.9)], -1)
  labels[0, 0, 0] = NO_LABEL
  state = create_state(
    random_params(objective, target, 0), config.optimizer, MESH
  )
  step = compile_step(objective, config.optimizer, 1, MESH, state)
  batch = put_batch(
    {
      'pixels': pixels,
      'patch_labels': labels,
      'patch_boxes': boxes.astype(np.float32),
    },
    MESH,
  )
  for _ in range(40):
    state, metrics = step(state, batch)
  assert float(metrics['weight']) == 31
  assert float(metrics['accuracy']) > 0.95
  assert float(metrics['exact_boxes']) > 0.95
  with pytest.raises(DataError, match=r'label 2, .*classes=2 .*raise classes'):
    objective.check({'patch_labels': labels + 1})
