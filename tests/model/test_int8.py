import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.infer.score import score
from qwenvl_jax.model.config import DecoderConfig
from qwenvl_jax.model.int8 import quantize, quantize_params
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.model.stacking import unstack_layers


def int8_config():
  config = golden.config()
  return config.replace(
    decoder=dataclasses.replace(config.decoder, int8=True), scan_layers=False
  )


def plain():
  return golden.config(), golden.params()


@pytest.fixture(scope='module')
def params():
  return quantize_params(unstack_layers(golden.params()))


def test_values_are_within_half_a_step():
  kernel = np.random.default_rng(0).normal(size=(6, 4, 5)).astype(np.float32)
  kernel[2] = 0
  for array in (kernel, jnp.asarray(kernel)):
    values, scales = quantize(array, contracted=2)
    assert (values.dtype, scales.shape) == (np.int8, (6,))
    back = np.asarray(values) * np.asarray(scales)[:, None, None]
    step = np.abs(kernel).max(axis=(1, 2)) / 127
    error = np.abs(back - kernel).max(axis=(1, 2))
    assert (error <= 0.5001 * step).all()
    assert np.isfinite(np.asarray(scales)).all()


def test_products_are_those_of_the_values_that_are_held(params):
  """The whole model, beside plain kernels with the rounded values."""
  stored = unstack_layers(golden.params())

  def rounded(kernel):
    scales = np.asarray(kernel['scales'])
    values = np.asarray(kernel['values'], np.float32)
    return values * scales.reshape(
      scales.shape + (1,) * (values.ndim - scales.ndim)
    )

  def replace(tree, held):
    if isinstance(held, dict) and 'values' in held:
      return rounded(held)
    if isinstance(held, dict):
      return {name: replace(tree[name], held[name]) for name in held}
    return tree

  batch = golden.batch(golden.expected()['eval/one_image/ids'].reshape(1, -1))
  logits = [
    jax.jit(QwenVL(config).apply)({'params': tree}, batch)
    for config, tree in (
      (int8_config(), params),
      (golden.config().replace(scan_layers=False), replace(stored, params)),
    )
  ]
  np.testing.assert_allclose(*logits, atol=2e-4)


def test_kernels_take_a_quarter_of_float32(params):
  held, whole = (
    sum(x.nbytes for x in jax.tree.leaves(tree['decoder']))
    - tree['decoder']['embed'].nbytes
    for tree in (params, golden.params())
  )
  assert held < 0.27 * whole


@pytest.mark.parametrize(
  ('weights', 'cache', 'mean'),
  [(True, None, 0.034), (False, 'int8', 0.0093), (True, 'int8', 0.036)],
)
def test_quality_beside_float32(params, weights, cache, mean):
  """Mean change of a token's log-probability (-8.1) over 805 tokens."""
  ids = golden.expected()['eval/long_text/ids'].reshape(-1).tolist()
  rounded = (int8_config(), params) if weights else plain()
  scores = [
    score(
      # Pieces of 128 read what was written to the cache before.
      Engine(*model, EngineConfig(1, 1024, chunk=128, cache_dtype=kept)),
      [ids[:1]],
      [ids[1:]],
    )[0].logprobs
    for model, kept in ((plain(), None), (rounded, cache))
  ]
  change = np.abs(scores[1] - scores[0])
  # Other processors round otherwise, hence a fifth more.
  assert mean / 2 < change.mean() < 1.2 * mean
  assert change.max() < 0.25


def test_training_and_two_kinds_of_rounding_are_refused():
  with pytest.raises(ConfigError, match='8 or at 4 bits'):
    DecoderConfig(int8=True, int4_group=128)
  config = int8_config().replace(scan_layers=True)
  with pytest.raises(ConfigError, match='for inference'):
    jax.eval_shape(QwenVL(config).init, jax.random.key(0), golden.train_batch())
