"""Norms, GELU and biases in bfloat16, against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.model.layers import LayerNorm, RMSNorm, add_bias, gelu
from qwenvl_jax.model.remat import remat

# Half a unit in the last of bfloat16's 8 places, at most.
ROUNDING = 2.0**-8


def _bfloat16_between(low, high):
  """All numbers of bfloat16 from low to high."""
  every = np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16)
  every = every[np.isfinite(every.astype(np.float32))]
  return jnp.asarray(every[(every >= low) & (every <= high)])


def test_gelu_and_its_slope_are_rounded_once():
  x = _bfloat16_between(-30, 30)
  exact = np.asarray(x, np.float64)
  cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in exact])
  slope = cdf + exact * np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
  value, back = jax.vjp(gelu, x)
  (found,) = back(jnp.ones_like(x))
  assert value.dtype == found.dtype == jnp.bfloat16
  for got, wanted in ((value, exact * cdf), (found, slope)):
    error = np.abs(np.asarray(got, np.float64) - wanted)
    # 5e-7: what 1 + erf loses where it is nearly zero.
    assert (error <= 1.001 * ROUNDING * np.abs(wanted) + 5e-7).all()


def test_gelu_of_float32_is_that_of_jax():
  x = jnp.linspace(-6, 6, 1001)
  wanted = jax.nn.gelu(x, approximate=False)
  np.testing.assert_array_equal(gelu(x), wanted)


def _layer_norm(x):
  """Of float64, with scale 1 and bias 0."""
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)


# Means of so many standard deviations.
@pytest.mark.parametrize('offset', [0, 3, 30])
def test_layer_norm_of_bfloat16(offset):
  x = np.random.default_rng(0).normal(size=(64, 1664)) + offset
  x = jnp.asarray(x, jnp.bfloat16)
  norm = LayerNorm(1e-6)
  params = norm.init(jax.random.key(0), x)
  wanted = _layer_norm(np.asarray(x, np.float64))
  value, back = jax.vjp(lambda x: norm.apply(params, x), x)
  error = np.abs(np.asarray(value, np.float64) - wanted)
  assert (error <= 1.01 * ROUNDING * np.abs(wanted) + 1e-4).all()

  # The gradient, against that of the path of float32.
  given = jnp.asarray(
    np.random.default_rng(1).normal(size=x.shape), jnp.bfloat16
  )
  _, plain = jax.vjp(lambda x: norm.apply(params, x), x.astype(jnp.float32))
  (wanted,) = plain(given.astype(jnp.float32))
  error = np.abs(np.asarray(back(given)[0], np.float64) - wanted)
  assert (error <= 1.01 * ROUNDING * np.abs(wanted) + 1e-4).all()


@pytest.mark.parametrize('value', [0.0, 100.0])
def test_layer_norm_of_equal_numbers_is_its_bias(value):
  x = jnp.full((2, 1664), value, jnp.bfloat16)
  norm = LayerNorm(1e-6)
  params = norm.init(jax.random.key(0), x)
  np.testing.assert_array_equal(norm.apply(params, x), 0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradient_of_a_bias_is_the_sum_over_rows(dtype):
  y = jnp.zeros((3, 50, 4, 104), dtype)
  given = np.random.default_rng(0).normal(size=y.shape)
  given = jnp.asarray(given, dtype)
  _, back = jax.vjp(add_bias, y, jnp.ones((4, 104), dtype))
  of_y, of_bias = back(given)
  np.testing.assert_array_equal(of_y, given)
  exact = np.asarray(given, np.float64)
  wanted = exact.sum((0, 1))
  rounding = ROUNDING if dtype == 'bfloat16' else 1e-6
  assert of_bias.dtype == given.dtype
  error = np.abs(np.asarray(of_bias, np.float64) - wanted)
  assert (error <= 1.01 * rounding * np.abs(wanted) + 1e-5).all()


@pytest.mark.parametrize('norm', [LayerNorm, RMSNorm])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_layer_that_keeps_nothing_keeps_what_its_norms_found(norm, dtype):
  x = jnp.ones((2, 8, 16), dtype)

  def means(module):
    layer = module(1e-6)
    params = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda x: layer.apply(params, x).sum().astype('f4'))
    return str(jax.make_jaxpr(gradient)(x)).count('reduce_sum')

  assert means(remat(norm, 'full')) == means(norm)
