"""What the engine keeps on the device, and what it tells the host."""

import dataclasses
from typing import Any, NamedTuple

import jax

from qwenvl_jax.infer.sampling import Settings
from qwenvl_jax.model.cache import KVCache, place_layer
from qwenvl_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
  """A prompt, or what was read of it so far.

  Attributes:
    cache: of one row.
    tokens: [1,S] int32; -1 where nothing was read yet.
    logits: [1,V] float32 of the token after what was read.
  """

  cache: KVCache
  tokens: jax.Array
  logits: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """B slots.

  Attributes:
    cache: of B rows.
    logits: [B,V] float32 of the next token.
    tokens: [B] int32, the last chosen.
    active: [B] bool, slots in use.
    generated: [B] int32, tokens chosen so far.
    settings: of sampling.
    counts: [B,V] int32, how often each token was chosen.
    in_prompt: [B,V] bool, tokens of the prompt.
  """

  cache: KVCache
  logits: jax.Array
  tokens: jax.Array
  active: jax.Array
  generated: jax.Array
  settings: Settings
  counts: jax.Array
  in_prompt: jax.Array


class Chosen(NamedTuple):
  """What `choose` tells the host of each slot.

  Attributes:
    tokens: [B] int32.
    valid: [B] bool, false where logits were not finite.
    possible: [B] bool, false where every token was ruled out.
    logprobs: [B] float32, log-probability of the token by the model itself,
      before settings change it.
    top_ids: [B,K] int32, the most likely tokens.
    top_logprobs: [B,K] float32.
  """

  tokens: Any
  valid: Any
  possible: Any
  logprobs: Any
  top_ids: Any
  top_logprobs: Any


class Scores(NamedTuple):
  """What the model says of given tokens.

  Attributes:
    logprobs: [T] float32.
    top_ids: [T,K] int32, the most likely tokens in their places.
    top_logprobs: [T,K] float32.
  """

  logprobs: Any
  top_ids: Any
  top_logprobs: Any


def place(state: State) -> State:
  """Splits a state over the mesh in use, alike after every program."""

  def rows(x):
    names = ('batch', 'vocab_act') if x.ndim == 2 else ('batch',)
    return constrain(x, *names)

  cache = state.cache
  return State(
    cache=KVCache(
      tuple(place_layer(layer) for layer in cache.layers),
      rows(cache.lengths),
      rows(cache.prompt_lengths),
      None if cache.ranks is None else constrain(cache.ranks, 'batch', None),
    ),
    logits=rows(state.logits),
    tokens=rows(state.tokens),
    active=rows(state.active),
    generated=rows(state.generated),
    settings=jax.tree.map(
      lambda x: constrain(x, 'batch', *(None,) * (x.ndim - 1)), state.settings
    ),
    counts=rows(state.counts),
    in_prompt=rows(state.in_prompt),
  )
