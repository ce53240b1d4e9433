"""Beam search over many prompts, as `transformers` defines it.

A beam's score is its summed log-probability, a finished one's that divided by
its number of new tokens (end token included) to the power `length_penalty`.
Each step ranks all continuations of a row's beams; an end token among the best
`beams` of them finishes one, the best others run on. A row is done when it has
`beams` finished ones and the best running beam, scored at its present length,
beats none of them; at the length limit, what runs counts as finished.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.infer import generate as generation
from qwenvl_jax.infer.generate import Params
from qwenvl_jax.infer.sampling import Chooser, Sampling
from qwenvl_jax.model.cache import KVCache
from qwenvl_jax.model.qwen_vl import QwenVL


class Hypothesis(NamedTuple):
  """An answer and its score; higher is better."""

  ids: list[int]
  score: float


def beam_search(
  model: QwenVL,
  params: Params,
  prompts: Sequence[Sequence[int]],
  images: Sequence | None = None,
  *,
  beams: int,
  max_new_tokens: int,
  stop_ids: Sequence[int] = (),
  length_penalty: float = 1.0,
  min_new_tokens: int = 0,
  batch_size: int = 8,
) -> list[Hypothesis]:
  """The best continuation of every prompt; rows do not influence each other.

  Args:
    model: the module.
    params: its parameters.
    prompts: token ids, of any lengths.
    images: as in `generate`.
    beams: continuations kept for a prompt.
    max_new_tokens: most tokens of an answer.
    stop_ids: end tokens; not part of the ids returned.
    length_penalty: 0 for the sum of log-probabilities, 1 for their mean; more
      favours longer answers.
    min_new_tokens: no end token before this many.
    batch_size: most prompts searched together; each takes `beams` rows.

  Returns:
    A hypothesis a prompt, in order.

  Raises:
    DataError: a prompt or its images cannot be used; names the row.
    ConfigError: settings out of range.
  """
  generation.check_count('beams', beams)
  generation.check_count('max_new_tokens', max_new_tokens)
  chooser = Chooser.create(Sampling(), stop_ids, min_new_tokens)
  results = {}
  for chosen, (logits, cache), rows in generation.prefill_in_batches(
    model, params, prompts, images, max_new_tokens, batch_size
  ):
    tokens, scores = _search(
      model,
      params,
      _repeat_rows(cache, beams=beams),
      logits,
      chooser,
      np.float32(length_penalty),
      np.arange(rows) >= len(chosen),
      max_new_tokens,
      beams=beams,
      room=generation.room(max_new_tokens),
    )[0]
    tokens, scores = np.asarray(tokens).tolist(), np.asarray(scores).tolist()
    for row, new, score in zip(chosen, tokens, scores, strict=False):
      ids = generation.cut(new[:max_new_tokens], stop_ids)
      results[row] = Hypothesis(ids, score)
  return [results[row] for row in range(len(prompts))]


class _State(NamedTuple):
  """Beams of B rows, K each, best first; -inf scores where there is none."""

  step: Any  # [] int32, new tokens so far
  new: Any  # [B,K,room] int32, of the running beams
  scores: Any  # [B,K] float32, of the running beams
  finished: Any  # [B,K,room] int32
  finished_scores: Any  # [B,K] float32
  done: Any  # [B] bool
  cache: KVCache  # B*K rows


@functools.partial(
  jax.jit,
  static_argnames=('model', 'beams', 'room'),
  donate_argnames='cache',
)
def _search(
  model,
  params,
  cache,
  logits,
  chooser,
  length_penalty,
  done,
  limit,
  *,
  beams,
  room,
):
  rows = logits.shape[0]
  # The beams of a row are alike at first: all but one are out of the race.
  start = jnp.full((rows, beams), -jnp.inf).at[:, 0].set(0)
  new = jnp.zeros((rows, beams, room), jnp.int32)
  state = _State(
    step=jnp.int32(0),
    new=new,
    scores=start,
    finished=new,
    finished_scores=jnp.full((rows, beams), -jnp.inf),
    done=done,
    cache=cache,
  )
  advance = functools.partial(_advance, chooser, length_penalty, limit)
  state = advance(state, jnp.repeat(logits, beams, axis=0))

  def unfinished(state):
    return (state.step < limit) & ~state.done.all()

  def decode(state):
    tokens = jax.lax.dynamic_index_in_dim(
      state.new, state.step - 1, axis=2, keepdims=False
    )
    logits, cache = generation.extend(
      model, params, state.cache, tokens.reshape(-1), state.step
    )
    return advance(state._replace(cache=cache), logits)

  state = jax.lax.while_loop(unfinished, decode, state)
  return (state.finished[:, 0], state.finished_scores[:, 0]), state.cache


def _advance(chooser, length_penalty, limit, state, logits) -> _State:
  """One step from logits [B*K,V] of the running beams."""
  rows, beams = state.scores.shape
  vocabulary = logits.shape[-1]
  logits = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  logits = chooser.suppress_stop(logits, state.step)
  total = state.scores[..., None] + logits.reshape(rows, beams, vocabulary)
  # Enough that `beams` of them run on even if every end token is among them.
  count = min(beams * (1 + chooser.stop.size), beams * vocabulary)
  scores, flat = jax.lax.top_k(total.reshape(rows, -1), count)
  source, tokens = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
  new = jnp.take_along_axis(state.new, source[..., None], axis=1)
  new = jax.lax.dynamic_update_slice(new, tokens[..., None], (0, 0, state.step))
  step = state.step + 1
  ends = (tokens[..., None] == chooser.stop).any(-1)
  finishes = (ends | (step >= limit)) & (jnp.arange(count) < beams)
  finishes &= ~state.done[:, None]

  length_factor = step.astype(jnp.float32) ** length_penalty
  finished_scores, finished = _best(
    jnp.concatenate(
      [
        state.finished_scores,
        jnp.where(finishes, scores / length_factor, -jnp.inf),
      ],
      axis=1,
    ),
    jnp.concatenate([state.finished, new], axis=1),
    count=beams,
  )
  scores, new, source = _best(
    jnp.where(ends, -jnp.inf, scores), new, source, count=beams
  )
  worst = finished_scores[:, -1]
  done = state.done | (scores[:, 0] / length_factor <= worst)
  flat_source = source + jnp.arange(rows)[:, None] * beams
  return _State(
    step=step,
    new=new,
    scores=scores,
    finished=finished,
    finished_scores=finished_scores,
    done=done,
    cache=_select_rows(state.cache, flat_source.reshape(-1)),
  )


def _best(scores, *arrays, count):
  """The `count` highest of scores [B,C], and what belongs to them."""
  scores, index = jax.lax.top_k(scores, count)
  taken = (
    jnp.take_along_axis(
      array, index.reshape(index.shape + (1,) * (array.ndim - 2)), axis=1
    )
    for array in arrays
  )
  return scores, *taken


@functools.partial(jax.jit, static_argnames='beams')
def _repeat_rows(cache: KVCache, *, beams: int) -> KVCache:
  rows = cache.prompt_lengths.shape[0]
  return _select_rows(cache, jnp.repeat(jnp.arange(rows), beams))


def _select_rows(cache: KVCache, index) -> KVCache:
  """The cache whose row i is row index[i]."""
  return KVCache(
    keys=jnp.take(cache.keys, index, axis=1),
    values=jnp.take(cache.values, index, axis=1),
    segment_ids=jnp.take(cache.segment_ids, index, axis=0),
    used=cache.used,
    prompt_lengths=jnp.take(cache.prompt_lengths, index, axis=0),
  )
