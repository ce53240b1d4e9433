"""Beam search over many prompts, as `transformers` defines it.

A beam's score is its summed log-probability, a finished one's that divided by
its number of new tokens (end token included) to the power `length_penalty`.
Each step ranks all continuations of a prompt's beams; an end token among the
best `beams` of them finishes one, the best others run on. A prompt is done when
it has `beams` finished ones and the best running beam, scored at its present
length, beats none of them; at the length limit, what runs counts as finished.

Every beam is a slot of the engine.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer import prompts as prompts_lib
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.image_bank import ImageBank
from qwenvl_jax.infer.reading import Reading
from qwenvl_jax.infer.request import GenerationError, Request, check_fits
from qwenvl_jax.infer.sampling import Sampling


class Hypothesis(NamedTuple):
  """An answer and its score; higher is better."""

  ids: list[int]
  score: float


def beam_search(
  engine: Engine,
  prompts: Sequence[Sequence[int]],
  images: Sequence | None = None,
  *,
  beams: int,
  max_new_tokens: int,
  stop_ids: Sequence[int] = (),
  length_penalty: float = 1.0,
  min_new_tokens: int = 0,
) -> list[Hypothesis]:
  """Finds the best continuation of every prompt.

  Args:
    engine: with at least `beams` slots; each prompt takes so many.
    beams: continuations kept for a prompt.
    length_penalty: 0 for the sum of log-probabilities, 1 for their mean; more
      favours longer answers.

  Returns:
    A hypothesis a prompt, in order.

  Raises:
    DataError: a prompt or its images cannot be used; names the row.
    ConfigError: settings out of range, or more beams than slots.
    GenerationError: the model's output cannot be used; names the row.
  """
  prompts_lib.check_count('beams', beams)
  if beams > engine.slots:
    raise ConfigError(
      f'beams={beams} are more than the {engine.slots} slots of the engine: '
      'each beam takes one (EngineConfig.slots)'
    )
  sampling = Sampling(stop_ids=stop_ids, min_new_tokens=min_new_tokens)
  images = prompts_lib.images_per_prompt(prompts, images)
  waiting = []
  for row, (prompt, pixels) in enumerate(zip(prompts, images, strict=True)):
    name = f'row {row}'
    request = Request.create(
      engine.config,
      prompt,
      pixels,
      name,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
    )
    check_fits(request, engine.max_len, engine.images, name)
    waiting.append(request)
  return _Driver(engine, beams, length_penalty).run(waiting)


class _Driver:
  """Searches of several prompts beside each other."""

  def __init__(self, engine: Engine, beams: int, length_penalty: float):
    self._engine, self._beams = engine, beams
    self._length_penalty = length_penalty
    self._bank = ImageBank(engine)
    self._state = engine.init_state()

  def run(self, requests: Sequence[Request]) -> list[Hypothesis]:
    beams = self._beams
    groups = self._engine.slots // beams
    free = [np.arange(beams) + beams * group for group in range(groups)]
    waiting = list(enumerate(requests))[::-1]
    running: dict[int, _Search] = {}
    found: dict[int, Hypothesis] = {}
    while waiting or running:
      while waiting and free:
        row, request = waiting.pop()
        running[row] = self._begin(request, free.pop())
      for row in self._advance(running):
        search = running.pop(row)
        found[row] = search.best()
        free.append(search.slots)
        for slot in search.slots:
          self._state = self._engine.free(self._state, int(slot))
    return [found[row] for row in range(len(requests))]

  def _begin(self, request: Request, slots: np.ndarray) -> '_Search':
    reading = Reading(self._engine, self._bank, [request])
    while not reading.finished:
      reading.step()
    for slot in slots:
      self._state = self._engine.insert(
        self._state, reading.prefix, [int(slot)], [request.sampling]
      )
    reading.release()
    return _Search(request, slots, self._length_penalty)

  def _advance(self, running: dict[int, '_Search']) -> list[int]:
    """One step of all searches; returns those that are done."""
    stops = max(len(s.request.sampling.stop_ids) for s in running.values())
    # So many of each beam that `beams` are left without the end tokens.
    top = prompts_lib.bucket(self._beams + stops)
    top = min(top, self._engine.config.decoder.vocab_size)
    self._state, chosen = self._engine.choose(self._state, None, top)
    chosen = jax.device_get(chosen)
    sources = np.arange(self._engine.slots)
    tokens, done = np.array(chosen.tokens), []
    for row, search in running.items():
      if not chosen.valid[search.slots].all():
        raise GenerationError(f'row {row}: the logits are not finite')
      ends = search.advance(
        chosen.top_ids[search.slots], chosen.top_logprobs[search.slots]
      )
      sources[search.slots] = search.slots[search.sources]
      tokens[search.slots] = search.tokens
      if ends:
        done.append(row)
    moved = np.flatnonzero(sources != np.arange(len(sources)))
    # Repeated, so that few numbers of slots are compiled for.
    targets = np.resize(
      moved if len(moved) else [0], prompts_lib.bucket(max(len(moved), 1))
    )
    self._state = self._engine.copy(
      self._state, sources[targets], targets, tokens
    )
    if len(done) < len(running):
      self._state = self._engine.forward(self._state)
    return done


@dataclasses.dataclass
class _Search:
  """The beams of one prompt, best first.

  Attributes:
    request: what is continued.
    slots: [K] of the engine.
    length_penalty: see `beam_search`.
    step: new tokens so far.
    ids: of the running beams.
    scores: [K] float32 of the running beams, -inf where there is none.
    finished: hypotheses, the best K, best first.
    sources: [K], which beam each came from in the last step.
    tokens: [K], the token it got there.
  """

  request: Request
  slots: np.ndarray
  length_penalty: float
  step: int = 0

  def __post_init__(self):
    beams = len(self.slots)
    self.ids: list[list[int]] = [[] for _ in range(beams)]
    # The beams are alike at first: all but one are out of the race.
    self.scores = np.full(beams, -np.inf, np.float32)
    self.scores[0] = 0
    self.finished: list[Hypothesis] = []

  def best(self) -> Hypothesis:
    return self.finished[0]

  def advance(self, ids: np.ndarray, logprobs: np.ndarray) -> bool:
    """One step.

    Args:
      ids: [K,C] the most likely tokens after each beam.
      logprobs: [K,C] float32 of these.

    Returns:
      Whether the search is done.
    """
    beams, sampling = len(self.slots), self.request.sampling
    stop = np.isin(ids, list(sampling.stop_ids))
    if self.step < sampling.min_new_tokens:
      logprobs = np.where(stop, np.float32(-np.inf), logprobs)
    total = self.scores[:, None] + logprobs.astype(np.float32)
    # Among equals, the better beam and the lower id come first.
    beam = np.repeat(np.arange(beams), ids.shape[1])
    order = np.lexsort((ids.ravel(), beam, -total.ravel()))
    self.step += 1
    at_limit = self.step >= self.request.max_new_tokens
    factor = np.float32(self.step) ** np.float32(self.length_penalty)
    runs, ends = [], []
    for rank, place in enumerate(order):
      source, token = int(beam[place]), int(ids.ravel()[place])
      score = total.ravel()[place]
      is_stop = bool(stop.ravel()[place])
      if rank < beams and (is_stop or at_limit):
        new = self.ids[source] + ([] if is_stop else [token])
        ends.append(Hypothesis(new, float(score / factor)))
      if not is_stop and len(runs) < beams:
        runs.append((score, source, token))
      if rank >= beams and len(runs) == beams:
        break
    # Sorting is stable: among equals, what finished first comes first.
    ranked = sorted(self.finished + ends, key=lambda found: -found.score)
    self.finished = ranked[:beams]
    # A vocabulary may be smaller than the number of beams.
    runs += [(np.float32(-np.inf), 0, 0)] * (beams - len(runs))
    self.scores = np.array([score for score, _, _ in runs], np.float32)
    self.sources = np.array([source for _, source, _ in runs])
    self.tokens = np.array([token for _, _, token in runs], np.int32)
    self.ids = [self.ids[source] + [token] for _, source, token in runs]
    if at_limit:
      return True
    full = len(self.finished) == beams
    return full and self.scores[0] / factor <= self.finished[-1].score
