"""Learning rate: linear warm-up, then half a cosine."""

from collections.abc import Callable

import jax.numpy as jnp

from qwenvl_jax.errors import ConfigError


def warmup_cosine(peak: float, end: float, warmup: int, steps: int) -> Callable:
  """Rate of update k, counted from 0.

  `peak*(k+1)/warmup` while k < warmup, then
  `end + (peak-end)*(1+cos(pi*(k-warmup)/(steps-warmup)))/2`; `end` from `steps`
  on.

  >>> rate = warmup_cosine(peak=1e-3, end=1e-5, warmup=4, steps=20)
  >>> [round(float(rate(k)), 6) for k in (0, 3, 4, 12, 20)]
  [0.00025, 0.001, 0.001, 0.000505, 1e-05]

  Args:
    peak: rate of the last update of the warm-up.
    end: rate the cosine ends at.
    warmup: number of updates of the warm-up, may be 0.
    steps: number of updates in all.

  Returns:
    A function of an int or int32 array k to a float32 scalar.

  Raises:
    ConfigError: the warm-up leaves no room for the cosine.
  """
  if not 0 <= warmup < steps:
    raise ConfigError(
      f'warmup={warmup} of steps={steps}: the warm-up must be shorter than the '
      'schedule (lower OptimizerConfig.warmup or raise OptimizerConfig.steps)'
    )

  def rate(k):
    k = jnp.asarray(k, jnp.float32)
    done = jnp.clip((k - warmup) / (steps - warmup), 0.0, 1.0)
    cosine = end + (peak - end) * (1 + jnp.cos(jnp.pi * done)) / 2
    return jnp.where(k < warmup, peak * (k + 1) / max(warmup, 1), cosine)

  return rate
