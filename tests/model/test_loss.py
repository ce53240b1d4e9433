import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwenvl_jax.model.loss import next_token_loss


def example(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  logits = 3 * jax.random.normal(keys[0], (2, 5, 11), dtype)
  targets = jax.random.randint(keys[1], (2, 5), 0, 11)
  weights = jax.random.uniform(keys[2], (2, 5)).at[0, 1].set(0)
  return logits, targets, weights


def reference(logits, targets, weights):
  loss = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), targets
  )
  return jnp.sum(loss * weights)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_value_and_gradient(dtype):
  logits, targets, weights = example(dtype)
  (loss, weight), gradient = jax.value_and_grad(
    lambda x: next_token_loss(x, targets, weights), has_aux=True
  )(logits)
  wanted, wanted_gradient = jax.value_and_grad(reference)(
    logits, targets, weights
  )
  assert float(loss) == pytest.approx(float(wanted), rel=1e-6)
  assert float(weight) == pytest.approx(float(weights.sum()), rel=1e-6)
  assert loss.dtype == jnp.float32
  assert gradient.dtype == dtype
  tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
  np.testing.assert_allclose(
    np.float32(gradient), np.float32(wanted_gradient), atol=tolerance
  )


def test_what_carries_no_loss_may_be_anything():
  logits, targets, weights = example()
  broken = logits.at[0, 1].set(jnp.nan)

  def loss(x):
    return next_token_loss(x, targets, weights)[0]

  assert float(loss(broken)) == float(loss(logits))
  gradient = jax.grad(loss)(broken)
  assert not gradient[0, 1].any()
  np.testing.assert_array_equal(gradient, jax.grad(loss)(logits))
