import fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train import optimizer
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import OptimizerConfig
from qwenvl_jax.train.state import abstract_params, abstract_state


def config(**changes):
  values = {'peak': 1.0, 'end': 0.1, 'warmup': 0, 'steps': 10}
  return OptimizerConfig(**{**values, **changes})


def tree(**leaves):
  return optimizer.unflatten(
    {k.replace('__', '/'): v for k, v in leaves.items()}
  )


def test_vision_layers_are_slower_the_further_from_the_adapter():
  c = config(vision_layer_decay=0.95)

  def factor(path, shape):
    return optimizer.rate_factor(path, shape, c, blocks=3)

  for path in ('patch_embed/kernel', 'pos_embed', 'ln_pre/bias'):
    assert factor(f'vision/{path}', (4, 4)) == pytest.approx(0.95**4)
  stacked = factor('vision/blocks/mlp/up/kernel', (3, 8, 16))
  assert stacked.shape == (3, 1, 1)
  np.testing.assert_allclose(
    stacked.ravel(), [0.95**3, 0.95**2, 0.95], rtol=1e-6
  )
  assert factor('adapter/query', (4, 4)) == 1
  assert factor('decoder/blocks/mlp/up/kernel', (3, 4, 4)) == 1


def test_rates_multiply_by_path_and_the_first_match_counts():
  c = config(rates={'adapter/ln.*': 3.0, 'adapter/.*': 2.0})
  assert optimizer.rate_factor('adapter/ln_q/bias', (4,), c, 2) == 3
  assert optimizer.rate_factor('adapter/query', (4,), c, 2) == 2
  assert optimizer.rate_factor('decoder/embed', (4,), c, 2) == 1


def test_decay_spares_biases_and_norms_only():
  params = tree(
    a__kernel=jnp.ones((2, 2)),
    a__bias=jnp.ones((2, 2)),  # Two dimensions, but a bias: heads x width.
    ln__scale=jnp.ones(2),
    pos_embed=jnp.ones((2, 2)),
  )
  c = config(weight_decay=0.5)
  transform = optimizer.make_optimizer(c)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = transform.update(zeros, transform.init(params), params)
  flat = optimizer.flatten(updates)
  assert float(flat['a/kernel'][0, 0]) == pytest.approx(-0.5)
  assert float(flat['pos_embed'][0, 0]) == pytest.approx(-0.5)
  assert not flat['a/bias'].any() and not flat['ln/scale'].any()


def test_frozen_parameters_have_no_state_and_no_master_copy():
  model = NextToken(fake.small_config(dtype='bfloat16'))
  c = config(trainable=('vision/.*', 'adapter/.*'))
  mesh = make_mesh()
  params = abstract_params(model, c, mesh)
  state = abstract_state(params, c, mesh)

  assert set(state.trained) == {'vision', 'adapter'}
  assert set(state.frozen) == {'decoder', 'adapter'}
  # The sine-cosine table is a constant, whatever the patterns say.
  assert list(state.frozen['adapter']) == ['pos_embed']
  assert not any('decoder' in key for key in fake.keys(state.opt_state))

  trained = sum(x.size for x in jax.tree.leaves(state.trained))
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  assert moments == 2 * trained
  assert {str(x.dtype) for x in jax.tree.leaves(state.trained)} == {'float32'}
  decoder = jax.tree.leaves(state.frozen['decoder'])
  assert {str(x.dtype) for x in decoder} == {'bfloat16'}
  assert optimizer.merge(state.trained, state.frozen).keys() == params.keys()


def test_a_pattern_that_matches_nothing_says_what_there_is():
  params = tree(vision__ln__scale=jnp.ones(2), decoder__embed=jnp.ones(2))
  with pytest.raises(ConfigError, match=r"'visoin/\.\*' matches no.*vision/"):
    optimizer.split(params, config(trainable=('visoin/.*',)))
  with pytest.raises(ConfigError, match='rates'):
    optimizer.split(params, config(rates={'adapter/.*': 2.0}))
  with pytest.raises(ConfigError, match='no regular expression'):
    config(trainable=('vision/(',))


def test_layer_decay_without_trained_vision_is_refused():
  params = tree(decoder__embed=jnp.ones(2))
  c = config(vision_layer_decay=0.95)
  transform = optimizer.make_optimizer(c)
  with pytest.raises(ConfigError, match='no vision block is trained'):
    transform.update(params, transform.init(params), params)
