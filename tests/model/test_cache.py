"""Writing and reading a layer's keys and values, in float and in int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from qwenvl_jax.model.cache import KVCache, dequantize, quantize, read, write


def test_a_vector_keeps_a_254th_of_its_largest_value():
  x = jax.random.normal(jax.random.key(0), (3, 5, 64)) * jnp.array(
    [[[1e-6]], [[1.0]], [[1e6]]]
  )
  values, scales = quantize(x)
  assert values.dtype == jnp.int8
  assert scales.shape == (3, 5)
  error = np.abs(dequantize(values, scales, jnp.float32) - x).max(-1)
  largest = np.abs(x).max(-1)
  assert (error <= largest / 254 * 1.001).all()
  assert (np.abs(values).max(-1) == 127).all()
  # The largest value comes back as it was, and so does its opposite.
  again, _ = quantize(-x)
  np.testing.assert_array_equal(again, -values)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_that():
  x = jnp.array([[0.0, 0.0], [1.0, jnp.nan], [-jnp.inf, 1.0]])
  found = np.asarray(dequantize(*quantize(x), jnp.float32))
  assert (found[0] == 0).all()
  assert np.isnan(found[1]).any()
  assert not np.isfinite(found[2]).all()


@pytest.mark.parametrize('dtype', [None, 'int8'])
def test_what_is_written_is_read_at_its_place(dtype):
  config = toy.config(layers=2)
  cache = KVCache.create(config, 3, 32, dtype=dtype)
  assert cache.size == 32
  assert len(cache.layers) == 2
  shape = (3, config.decoder.heads, 5, config.decoder.head_dim)
  k, v = (jax.random.normal(jax.random.key(n), shape) for n in range(2))
  layer = write(cache.layers[0], k, v, jnp.int32(7))
  keys, values = read(layer, jnp.float32)
  for found, given in ((keys, k), (values, v)):
    tolerance = 0 if dtype is None else float(jnp.abs(given).max()) / 250
    np.testing.assert_allclose(found[:, :, 7:12], given, atol=tolerance)
    assert (found[:, :, :7] == 0).all()
    assert (found[:, :, 12:] == 0).all()
