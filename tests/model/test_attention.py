"""Splash attention and XLA's compute the same, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.attention import attend, causal_mask, full_mask

# Rows packed from several samples, with padding at the end and all through.
SEGMENTS = np.repeat([[1, 2, 3, 0], [1, 1, 1, 1], [0, 0, 0, 0]], 64, axis=1)


def inputs(queries, keys, head_dim, rows=3):
  shapes = [(rows, queries, 1, head_dim), *[(rows, keys, 1, head_dim)] * 2]
  return [
    jax.random.normal(key, shape)
    for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes)
  ]


def both(make_mask, arrays, real):
  """(value, gradients) of each kernel, where `real` is not 0."""

  def run(kernel):
    def loss(q, k, v):
      out = attend(q, k, v, make_mask(kernel)) * real
      return jnp.sum(
        out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)
      ), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    grads, out = run(*arrays)
    return out, *grads

  return run('xla'), run('splash')


def assert_close(one, other):
  for a, b in zip(one, other, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_packed_rows():
  # The head dimension of vision, which is no multiple of a TPU's lanes.
  arrays = inputs(256, 256, 104)
  segments = jnp.asarray(SEGMENTS)
  real = (segments > 0)[..., None, None]
  assert_close(
    *both(lambda kernel: causal_mask(segments, None, kernel), arrays, real)
  )


def test_queries_that_read_patches():
  arrays = inputs(128, 256, 128, rows=1)
  assert_close(*both(lambda kernel: full_mask(128, 256, kernel), arrays, 1.0))


def test_what_splash_attention_cannot_do():
  rows = jnp.ones((1, 128), jnp.int32)
  with pytest.raises(ConfigError, match='NextToken.branches=0'):
    causal_mask(rows, rows, 'splash')
  with pytest.raises(ConfigError, match='multiples of 128 queries'):
    full_mask(36, 36, 'splash')


def test_a_cpu_has_no_use_for_it():
  rows = jnp.ones((1, 128), jnp.int32)
  assert causal_mask(rows, None, 'auto').kernel == 'xla'
