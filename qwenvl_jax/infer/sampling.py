"""From logits to the next token: temperature, top-k, top-p.

Pure functions on [...,V] float32 logits; a removed token gets -inf. Top-k and
top-p work on ranked logits, so that a vocabulary is sorted once a token. The
settings may be arrays, so that one program serves them all.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qwenvl_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: 0 takes the most likely token; 1 samples as the model says.
    top_k: sample among the k most likely tokens; 0 for all.
    top_p: sample among the most likely tokens that together reach this
      probability; 1 for all. The released chat model's setting is 0.3.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ConfigError(
        f'temperature={self.temperature} is not a number from 0 (always the '
        'most likely token) up'
      )
    if self.top_k < 0:
      raise ConfigError(f'top_k={self.top_k} is negative; 0 means no limit')
    if not 0 < self.top_p <= 1:
      raise ConfigError(
        f'top_p={self.top_p} is not in (0, 1]; 1 means no limit'
      )

  @property
  def greedy(self) -> bool:
    return self.temperature == 0


def apply_temperature(logits, temperature) -> jax.Array:
  """Logits divided by the temperature (> 0)."""
  return logits / temperature


def rank(logits) -> tuple[jax.Array, jax.Array]:
  """Logits from high to low, and their ids; among equals the lower id first.

  Args:
    logits: [...,V] float32.

  Returns:
    ([...,V] float32, [...,V] int32).
  """
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  ascending, ids = jax.lax.sort((-logits, ids), num_keys=1, is_stable=True)
  return -ascending, ids


def keep_top_k(ranked, k) -> jax.Array:
  """Keeps the k highest logits and all that equal the k-th; 0 keeps all.

  Args:
    ranked: [...,V] float32 from `rank`.
    k: int, may be traced.
  """
  size = ranked.shape[-1]
  k = jnp.where(k <= 0, size, jnp.minimum(k, size))
  threshold = jnp.take(ranked, k - 1, axis=-1)[..., None]
  return jnp.where(ranked < threshold, -jnp.inf, ranked)


def keep_top_p(ranked, p) -> jax.Array:
  """Keeps the fewest most likely tokens that together reach probability p.

  A token stays if those ahead of it sum to less than p, so one always does.

  Args:
    ranked: [...,V] float32 from `rank`, possibly with -inf.
    p: float in (0, 1], may be traced; 1 keeps all.
  """
  probabilities = jax.nn.softmax(ranked, axis=-1)
  ahead = jnp.cumsum(probabilities, axis=-1) - probabilities
  # Rounding must not drop a tail token when nothing is to be dropped.
  keep = (ahead < p) | (p >= 1)
  keep = keep.at[..., 0].set(True)
  return jnp.where(keep, ranked, -jnp.inf)


def sample(logits, keys, temperature, top_k, top_p) -> jax.Array:
  """Draws one token a row.

  Args:
    logits: [B,V] any float.
    keys: [B] PRNG keys, one a row: what a row draws does not depend on its
      neighbours.
    temperature: > 0.
    top_k: 0 for no limit.
    top_p: 1 for no limit.

  Returns:
    [B] int32.
  """
  logits = apply_temperature(logits.astype(jnp.float32), temperature)
  ranked, ids = rank(logits)
  ranked = keep_top_p(keep_top_k(ranked, top_k), top_p)
  places = jax.vmap(jax.random.categorical)(keys, ranked)
  return jnp.take_along_axis(ids, places[:, None], axis=1)[:, 0]


def take_best(logits) -> jax.Array:
  """[B,V] logits to the [B] int32 most likely tokens; ties to the lowest."""
  return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)
