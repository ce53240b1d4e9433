"""The engine in this process as what answers examples."""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax import image
from qwenvl_jax.errors import BadRecordError, QwenVLError
from qwenvl_jax.eval.answering import (
  Ahead,
  Problem,
  Reply,
  cut,
  likeliest,
  seed_of,
)
from qwenvl_jax.eval.prompting import token_ids
from qwenvl_jax.eval.task import Decoding, Example
from qwenvl_jax.infer.chat import stop_ids
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.request import Answer, Request, check_fits
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.text.tokenizer import Tokenizer

# Threads that decode pictures, at most.
_THREADS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class _Prepared:
  """An example on its way: its requests, or why there are none."""

  example: Example
  requests: tuple[Request, ...]
  problem: Problem | None = None


class _Asked(NamedTuple):
  """An example that is being answered, one answer a request."""

  example: Example
  answers: tuple[Answer, ...]

  @property
  def finished(self) -> bool:
    return all(answer.finished for answer in self.answers)


class EngineModel:
  """Answers on an engine, in all of its slots.

  Pictures are decoded ahead in threads, prompts of like length are read
  together, and the features of a picture serve all questions about it that are
  asked near each other.
  """

  def __init__(
    self, engine: Engine, tokenizer: Tokenizer, identity: dict[str, Any]
  ):
    """Takes an engine into use."""
    self._engine, self._tokenizer = engine, tokenizer
    self._identity = identity
    self._scheduler = Scheduler(
      engine, read_tokens=engine.slots * engine.max_len
    )

  def identity(self) -> dict[str, Any]:
    return self._identity

  def answer(
    self, examples: Iterable[Example], decoding: Decoding
  ) -> Iterator[tuple[Example, Reply | Problem]]:
    slots = self._engine.slots
    rows = min(self._engine.read_rows, slots)
    threads = min(os.cpu_count() or 1, _THREADS)
    ahead = Ahead(
      lambda example: self._prepare(example, decoding),
      *(examples, threads, slots + threads),
    )
    ready: list[_Prepared] = []
    asked: list[_Asked] = []
    try:
      while ahead.left or ready or asked:
        # Slots wait until so many are free that prompts are read together.
        while (ahead.left or ready) and self._free() >= rows:
          for found in ahead.take(slots - len(ready), rows - len(ready)):
            if found.problem:
              yield found.example, found.problem
            else:
              ready.append(found)
          group = self._alike(ready)
          ready = [x for x in ready if x not in group]
          asked += self._submit(group)
        self._scheduler.step()
        done = [x for x in asked if x.finished]
        asked = [x for x in asked if not x.finished]
        for one in done:
          yield one.example, self._reply(one, decoding)
    finally:
      ahead.close()
      for one in asked:
        for answer in one.answers:
          self._scheduler.cancel(answer)

  def _free(self) -> int:
    """Slots that nobody has or waits for."""
    load = self._scheduler.load
    return load.free - load.waiting

  def _alike(self, ready: Sequence[_Prepared]) -> list[_Prepared]:
    """Of those of one length, as few programs see it, who are read next.

    They are of the length of which most are ready.
    """
    groups = collections.defaultdict(list)
    for one in ready:
      size = self._engine.prefix_size(len(one.requests[0].tokens))
      groups[size].append(one)
    most = max(groups.values(), key=len, default=[])
    return most[: self._engine.read_rows]

  def _prepare(self, example: Example, decoding: Decoding) -> _Prepared:
    """Opens an example's pictures and makes its requests."""
    engine, tokenizer = self._engine, self._tokenizer
    config = engine.config
    try:
      ids = token_ids(tokenizer, example.prompt, config.adapter.queries)
      pixels = [
        image.resize(picture.open(), config.vision.image_size)
        for picture in example.prompt.pictures
      ]
      if example.choices:
        requests = [
          Request.create(
            config,
            ids + _choice_ids(tokenizer, choice),
            pixels,
            example.key,
            max_new_tokens=0,
            prompt_logprobs=0,
          )
          for choice in example.choices
        ]
      else:
        sampling = Sampling(
          decoding.temperature,
          top_p=decoding.top_p,
          min_new_tokens=decoding.min_tokens,
          stop_ids=stop_ids(tokenizer),
          seed=(seed_of(example, decoding), 0),
        )
        requests = [
          Request.create(
            config,
            ids,
            pixels,
            example.key,
            max_new_tokens=decoding.max_tokens,
            sampling=sampling,
          )
        ]
      for request in requests:
        _check_fits(request, engine, example.key)
    except QwenVLError as error:
      return _Prepared(example, (), Problem.of(error))
    return _Prepared(example, tuple(requests))

  def _submit(self, prepared: Iterable[_Prepared]) -> list[_Asked]:
    return [
      _Asked(
        one.example,
        tuple(
          self._scheduler.submit(request, name=one.example.key)
          for request in one.requests
        ),
      )
      for one in prepared
    ]

  def _reply(self, asked: _Asked, decoding: Decoding) -> Reply | Problem:
    for answer in asked.answers:
      if answer.error is not None:
        return Problem.of(answer.error)
    if not asked.example.choices:
      text = self._tokenizer.decode(asked.answers[0].ids)
      return Reply(cut(text, decoding.stop))
    losses = []
    for choice, answer in zip(
      asked.example.choices, asked.answers, strict=True
    ):
      count = len(_choice_ids(self._tokenizer, choice))
      logprobs = answer.prompt_scores.logprobs[-count:]
      losses.append(-float(np.mean(logprobs, dtype=np.float64)))
    return likeliest(asked.example, losses)


def _choice_ids(tokenizer: Tokenizer, choice: str) -> list[int]:
  return tokenizer.encode_ordinary(choice)


def _check_fits(request: Request, engine: Engine, name: str) -> None:
  """As `request.check_fits`, with a reason to count."""
  try:
    check_fits(request, engine.max_len, engine.images, name)
  except QwenVLError as error:
    raise BadRecordError('too_long', str(error)) from error
