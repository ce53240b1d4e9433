"""From logits to the next token, with settings of its own for each row.

Pure functions on rows of float32 logits; a token that is ruled out gets -inf.
Settings are arrays, so that one program serves them all. Thresholds of top-k
and top-p are found by bisection on the bits of a float: 32 sums over the
vocabulary cost less than sorting it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.errors import ConfigError

# Places of a row for stop ids and for biased tokens.
MAX_STOPS = 16
MAX_BIASES = 300

# No token has this id: an unset place.
_NO_TOKEN = -1

# Temperatures above 0: logits divided by less leave float32, and divided by
# more all are alike.
MIN_TEMPERATURE = 1e-5
MAX_TEMPERATURE = 1e5

# What OpenAI's API allows.
_MAX_BIAS = 100.0
_MAX_PENALTY = 2.0

# A penalty that is a factor; its inverse is the least.
_MAX_FACTOR = 1000.0


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the tokens of an answer are chosen.

  Attributes:
    temperature: 0 takes the most likely token; 1 samples as the model says.
    top_k: sample among the k most likely tokens, and those as likely as the
      k-th; 0 for all.
    top_p: sample among the most likely tokens that together reach this
      probability, and those as likely as the last of them; 1 for all. The
      released chat model's setting is 0.3.
    min_p: sample among tokens at least this share as likely as the most likely
      one; 0 for all.
    repetition_penalty: divides positive logits, and multiplies negative ones,
      of tokens in prompt or answer (Keskar et al., arXiv 1909.05858); 1 for
      none.
    presence_penalty: taken from the logits of tokens in the answer.
    frequency_penalty: taken from them for each time they are in the answer.
    logit_bias: token id -> what is added to its logit.
    min_new_tokens: no stop id before this many tokens.
    stop_ids: an answer ends before the first of these.
    seed: of the randomness; the same seed gives the same answer, whatever is
      answered beside it.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  min_new_tokens: int = 0
  stop_ids: Sequence[int] = ()
  seed: int | tuple[int, ...] = 0

  def __post_init__(self):
    def check(name: str, fits: bool, wrong: str) -> None:
      if not fits:
        raise ConfigError(f'{name}={getattr(self, name)} is {wrong}')

    t = self.temperature
    check(
      'temperature',
      t == 0 or MIN_TEMPERATURE <= t <= MAX_TEMPERATURE,
      'neither 0 (always the most likely token) nor from '
      f'{MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}',
    )
    check('top_k', self.top_k >= 0, 'negative; 0 means no limit')
    check('top_p', 0 < self.top_p <= 1, 'not in (0, 1]; 1 means no limit')
    check('min_p', 0 <= self.min_p <= 1, 'not in [0, 1]; 0 means no limit')
    check(
      'repetition_penalty',
      1 / _MAX_FACTOR <= self.repetition_penalty <= _MAX_FACTOR,
      f'not between {1 / _MAX_FACTOR:g} and {_MAX_FACTOR:g}; 1 means none',
    )
    for name in ('presence_penalty', 'frequency_penalty'):
      check(
        name,
        abs(getattr(self, name)) <= _MAX_PENALTY,
        f'not between -{_MAX_PENALTY:g} and {_MAX_PENALTY:g}; 0 means none',
      )
    few = self.min_new_tokens
    check('min_new_tokens', few >= 0, 'negative; 0 means no minimum')
    if len(self.stop_ids) > MAX_STOPS:
      raise ConfigError(
        f'{len(self.stop_ids)} stop ids are more than {MAX_STOPS}'
      )
    if len(self.logit_bias) > MAX_BIASES:
      raise ConfigError(
        f'logit_bias has {len(self.logit_bias)} tokens, more than {MAX_BIASES}'
      )
    for token, bias in self.logit_bias.items():
      if not abs(bias) <= _MAX_BIAS:
        raise ConfigError(
          f'logit_bias of token {token} is {bias}, not between '
          f'-{_MAX_BIAS:g} and {_MAX_BIAS:g}'
        )

  def check_ids(self, vocab_size: int) -> None:
    """ConfigError if a stop id or a biased token is not in the vocabulary."""
    for name, ids in (
      ('stop id', self.stop_ids),
      ('logit_bias of token', self.logit_bias),
    ):
      for token in ids:
        if not 0 <= token < vocab_size:
          raise ConfigError(
            f'{name} {token} is not in the vocabulary of {vocab_size}'
          )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
  """`Sampling` of B rows as arrays.

  Attributes:
    bias_ids: [B,MAX_BIASES] int32.
    bias_values: [B,MAX_BIASES] float32, 0 at unset places.
    stop_ids: [B,MAX_STOPS] int32, -1 at unset places.
    key: [B,2] uint32, data of a PRNG key. Other fields are [B], int32 or
      float32, as in `Sampling`.
  """

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array
  presence_penalty: jax.Array
  frequency_penalty: jax.Array
  bias_ids: jax.Array
  bias_values: jax.Array
  min_new_tokens: jax.Array
  stop_ids: jax.Array
  key: jax.Array

  @classmethod
  def create(cls, samplings: Sequence[Sampling]) -> 'Settings':
    """Lays settings into NumPy arrays, a row each."""

    def array(name, dtype):
      values = [getattr(s, name) for s in samplings]
      if dtype == np.int32:
        # More tokens than there are is all of them.
        values = [min(value, np.iinfo(dtype).max) for value in values]
      return np.asarray(values, dtype)

    rows = len(samplings)
    bias_ids = np.zeros((rows, MAX_BIASES), np.int32)
    bias_values = np.zeros((rows, MAX_BIASES), np.float32)
    stops = np.full((rows, MAX_STOPS), _NO_TOKEN, np.int32)
    for row, sampling in enumerate(samplings):
      stops[row, : len(sampling.stop_ids)] = sampling.stop_ids
      count = len(sampling.logit_bias)
      bias_ids[row, :count] = list(sampling.logit_bias)
      bias_values[row, :count] = list(sampling.logit_bias.values())
    floats = (
      *('temperature', 'top_p', 'min_p', 'repetition_penalty'),
      *('presence_penalty', 'frequency_penalty'),
    )
    return cls(
      **{name: array(name, np.float32) for name in floats},
      top_k=array('top_k', np.int32),
      bias_ids=bias_ids,
      bias_values=bias_values,
      min_new_tokens=array('min_new_tokens', np.int32),
      stop_ids=stops,
      key=np.stack([_key(sampling.seed) for sampling in samplings]),
    )


def _key(seed: int | tuple[int, ...]) -> np.ndarray:
  """[2] uint32 of a seed of any size; of a tuple, each number counts."""
  parts = seed if isinstance(seed, tuple) else (seed,)
  # Negative numbers and those past 64 bits are seeds like others. Without
  # their number, 0 at the end would not count.
  words = [len(parts), *(abs(part) * 2 + (part < 0) for part in parts)]
  return np.random.SeedSequence(words).generate_state(2, np.uint32)


def adjust(
  logits, settings: Settings, counts, in_prompt, generated, masks=None
):
  """Applies what changes logits before a token is drawn.

  Args:
    logits: [B,V] float32.
    settings: of the rows.
    counts: [B,V] int32, how often each token is in the answer so far.
    in_prompt: [B,V] bool, which tokens are in the prompt.
    generated: [B] int32, tokens of the answer so far.
    masks: [B,ceil(V/32)] uint32, a bit for each token that a grammar allows,
      the lowest first; None where all are allowed.

  Returns:
    [B,V] float32.
  """
  rows, vocabulary = logits.shape
  penalized = (
    (settings.repetition_penalty != 1)
    | (settings.presence_penalty != 0)
    | (settings.frequency_penalty != 0)
  )
  logits = jax.lax.cond(
    penalized.any(),
    lambda x: _penalize(x, settings, counts, in_prompt),
    lambda x: x,
    logits,
  )
  row = jnp.arange(rows)[:, None]
  logits = jax.lax.cond(
    (settings.bias_values != 0).any(),
    lambda x: x.at[row, settings.bias_ids].add(settings.bias_values),
    lambda x: x,
    logits,
  )
  early = generated < settings.min_new_tokens
  stops = jnp.where(early[:, None], settings.stop_ids, _NO_TOKEN)
  # An index past the end is dropped.
  stops = jnp.where(stops < 0, vocabulary, stops)
  logits = logits.at[row, stops].set(-jnp.inf, mode='drop')
  if masks is not None:
    bits = masks[:, :, None] >> jnp.arange(32, dtype=masks.dtype) & 1
    allowed = bits.reshape(rows, -1)[:, :vocabulary] == 1
    logits = jnp.where(allowed, logits, -jnp.inf)
  return logits


def _penalize(logits, settings: Settings, counts, in_prompt):
  repetition = settings.repetition_penalty[:, None]
  repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
  logits = jnp.where(in_prompt | (counts > 0), repeated, logits)
  logits -= settings.frequency_penalty[:, None] * counts
  return logits - settings.presence_penalty[:, None] * (counts > 0)


def draw(logits, settings: Settings, generated) -> jax.Array:
  """Chooses one token a row.

  What a row draws depends on its own logits, seed and number of tokens only.

  Args:
    logits: [B,V] float32.
    settings: of the rows.
    generated: [B] int32, tokens of the answers so far.

  Returns:
    [B] int32.
  """
  best = take_best(logits)
  hot = settings.temperature > 0

  def sample(logits):
    scaled = logits / jnp.where(hot, settings.temperature, 1)[:, None]
    scaled = truncate(scaled, settings)
    keys = jax.vmap(jax.random.fold_in)(
      jax.random.wrap_key_data(settings.key), generated
    )
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(hot, drawn.astype(jnp.int32), best)

  return jax.lax.cond(hot.any(), sample, lambda _: best, logits)


def take_best(logits) -> jax.Array:
  """[B,V] logits to the [B] int32 most likely tokens; ties to the lowest."""
  return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)


def truncate(logits, settings: Settings) -> jax.Array:
  """Rules out the less likely tokens by top-k, then top-p, then min-p.

  Args:
    logits: [B,V] float32, after the temperature.
    settings: of the rows.
  """
  limited = (settings.top_k > 0) & (settings.temperature > 0)
  logits = jax.lax.cond(
    limited.any(), lambda x: keep_top_k(x, settings.top_k), lambda x: x, logits
  )
  limited = (settings.top_p < 1) & (settings.temperature > 0)
  logits = jax.lax.cond(
    limited.any(), lambda x: keep_top_p(x, settings.top_p), lambda x: x, logits
  )
  floor = jnp.max(logits, axis=-1) + jnp.log(settings.min_p)
  return jnp.where(logits < floor[:, None], -jnp.inf, logits)


def keep_top_k(logits, k) -> jax.Array:
  """Keeps the k highest logits and all that equal the k-th.

  Args:
    logits: [B,V] float32.
    k: [B] int32; 0 keeps all.
  """
  vocabulary = logits.shape[-1]
  k = jnp.where(k <= 0, vocabulary, jnp.minimum(k, vocabulary))
  order = _ordered(logits)

  def enough(threshold):
    return jnp.sum(order >= threshold[:, None], axis=-1) >= k

  return jnp.where(order >= _highest(enough, k)[:, None], logits, -jnp.inf)


def keep_top_p(logits, p) -> jax.Array:
  """Keeps the most likely tokens that together reach probability p.

  The fewest that do, and all as likely as the last of them.

  Args:
    logits: [B,V] float32, possibly with -inf.
    p: [B] float32 in (0, 1]; 1 keeps all.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  order = _ordered(logits)

  # What is below the smallest float is no reason to keep nothing.
  least = jnp.maximum(p, jnp.finfo(jnp.float32).tiny)

  def enough(threshold):
    kept = jnp.where(order >= threshold[:, None], probabilities, 0)
    return jnp.sum(kept, axis=-1) >= least

  keep = (order >= _highest(enough, p)[:, None]) | (p >= 1)[:, None]
  return jnp.where(keep, logits, -jnp.inf)


def _ordered(logits) -> jax.Array:
  """Floats as uint32 in the same order."""
  bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _highest(enough, like) -> jax.Array:
  """[B] the highest uint32 thresholds that leave enough, bit by bit."""

  def try_bit(number, threshold):
    higher = threshold | jnp.uint32(1) << (31 - number).astype(jnp.uint32)
    return jnp.where(enough(higher), higher, threshold)

  start = jnp.zeros(like.shape, jnp.uint32)
  return jax.lax.fori_loop(0, 32, try_bit, start)
