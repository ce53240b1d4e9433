"""From logits to the next token: temperature, top-k, top-p.

Pure functions on [...,V] float32 logits; a removed token gets -inf. Top-k and
top-p work on ranked logits, so that a vocabulary is sorted once a token. The
settings may be arrays, so that one program serves them all.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.errors import ConfigError

# No token has this id: an unset place among the stop ids.
_NO_TOKEN = -1

# Places for stop ids; more of them cost new programs.
_STOPS = 4


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


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['stop', 'min_new', 'temperature', 'top_k', 'top_p', 'key'],
  meta_fields=['greedy'],
)
@dataclasses.dataclass(frozen=True)
class Chooser:
  """Chooses each row's next token; its settings are traced, not constants.

  Attributes:
    stop: [K] int32 ids that end an answer, padded with an id no token has.
    min_new: [] int32, no stop id is chosen before this many tokens.
    temperature: [] float32.
    top_k: [] int32.
    top_p: [] float32.
    key: PRNG key.
    greedy: whether to leave the last four aside.
  """

  stop: Any
  min_new: Any
  temperature: Any
  top_k: Any
  top_p: Any
  key: Any
  greedy: bool

  @classmethod
  def create(
    cls,
    sampling: Sampling,
    stop_ids: Sequence[int],
    min_new_tokens: int = 0,
    key: jax.Array | None = None,
  ) -> 'Chooser':
    stop = np.full(max(len(stop_ids), _STOPS), _NO_TOKEN, np.int32)
    stop[: len(stop_ids)] = stop_ids
    return cls(
      stop=stop,
      min_new=np.int32(min_new_tokens),
      temperature=np.float32(sampling.temperature),
      top_k=np.int32(sampling.top_k),
      top_p=np.float32(sampling.top_p),
      key=jax.random.key(0) if key is None else key,
      greedy=sampling.greedy,
    )

  def suppress_stop(self, logits, step) -> jax.Array:
    """[...,V] logits without the stop ids while `step` is too early."""
    ids = jnp.arange(logits.shape[-1])
    is_stop = (ids[:, None] == self.stop).any(axis=1)
    early = jnp.asarray(step) < self.min_new
    return jnp.where(early & is_stop, -jnp.inf, logits)

  def choose(self, logits, rows, step) -> jax.Array:
    """Next tokens.

    Args:
      logits: [B,V].
      rows: [B] int32, the number of each row, for its randomness.
      step: [] int32, new tokens so far.

    Returns:
      [B] int32.
    """
    logits = self.suppress_stop(logits.astype(jnp.float32), step)
    if self.greedy:
      return take_best(logits)
    keys = jax.vmap(
      lambda row: jax.random.fold_in(jax.random.fold_in(self.key, row), step)
    )(jnp.asarray(rows))
    return sample(logits, keys, self.temperature, self.top_k, self.top_p)

  def stops(self, tokens) -> jax.Array:
    """[B] bool: which tokens end an answer."""
    return (tokens[:, None] == self.stop).any(axis=1)
