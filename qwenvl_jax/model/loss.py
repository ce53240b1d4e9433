"""Next-token cross entropy, as a sum and a weight."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def next_token_loss(logits, targets, weights) -> tuple[jax.Array, jax.Array]:
  """Weighted cross entropy, summed; divide by the weight for the mean.

  Sums, so that microbatches and processes with different numbers of labelled
  tokens add up to the mean over the whole batch. Reductions are float32; what
  is kept for the backward pass are the logits in their own dtype.

  Args:
    logits: [...,V], any float dtype.
    targets: [...] int32.
    weights: [...] float32, 0 = no loss. Not differentiated.

  Returns:
    (float32 sum of weight * cross entropy, float32 sum of the weights).
  """
  return _forward(logits, targets, weights)[0]


def _forward(logits, targets, weights):
  weights = weights.astype(jnp.float32)
  lse = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  # A position without loss must not count even where its logits are not finite
  # (0 * inf): padding rows attend to nothing.
  nll = jnp.where(weights > 0, lse - picked.astype(jnp.float32), 0.0)
  sums = jnp.sum(nll * weights), jnp.sum(weights)
  return sums, (logits, targets, weights, lse)


def _backward(saved, cotangents):
  logits, targets, weights, lse = saved
  scale = (cotangents[0] * weights)[..., None]
  softmax = jnp.exp(logits.astype(jnp.float32) - lse[..., None])
  vocabulary = jax.lax.broadcasted_iota(
    jnp.int32, logits.shape, logits.ndim - 1
  )
  hit = (vocabulary == targets[..., None]).astype(jnp.float32)
  gradient = jnp.where(scale != 0, (softmax - hit) * scale, 0.0)
  return gradient.astype(logits.dtype), None, None


next_token_loss.defvjp(_forward, _backward)
