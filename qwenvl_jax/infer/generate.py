"""Continuations of many prompts, or of one token by token, by the engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from qwenvl_jax.infer import prompts as prompts_lib
from qwenvl_jax.infer.engine import Engine, EngineConfig, Params
from qwenvl_jax.infer.request import Answer, Request, check_fits
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.model.config import QwenVLConfig

# Prompts that are read together where nobody waits for single tokens.
_READ_ROWS = 8

# Engines for few tokens are alike, so that few sizes are compiled for.
_MIN_ROOM = 64


def engine_for(
  config: QwenVLConfig,
  params: Params,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  slots: int = 32,
  adapters: Mapping[str, np.ndarray] = MappingProxyType({}),
  **sizes,
) -> Engine:
  """Makes an engine that has room for these prompts and their answers.

  Args:
    slots: most prompts answered at a time.
    **sizes: other attributes of `EngineConfig`.
  """
  prompts_lib.check_count('max_new_tokens', max_new_tokens)
  prompts_lib.check_count('slots', slots)
  longest = max((len(prompt) for prompt in prompts), default=0)
  slots = min(prompts_lib.bucket(max(len(prompts), 1)), slots)
  return Engine(
    config,
    params,
    EngineConfig(
      slots=slots,
      max_len=room_for(config, longest + max_new_tokens),
      **{'read_rows': min(slots, _READ_ROWS)} | sizes,
    ),
    adapters,
  )


def room_for(config: QwenVLConfig, tokens: int) -> int:
  """An engine's `max_len` for so many tokens, one of few sizes."""
  room = prompts_lib.bucket(tokens, _MIN_ROOM)
  return min(room, config.decoder.max_position_embeddings)


def generate(
  engine: Engine,
  prompts: Sequence[Sequence[int]],
  images: Sequence | None = None,
  *,
  max_new_tokens: int,
  seed: int = 0,
  adapter: str | None = None,
  progress: Callable[[int], None] = lambda done: None,
  **sampling,
) -> list[list[int]]:
  """Continues every prompt; each gets what it would get alone.

  Args:
    engine: with room for the longest, see `engine_for`.
    images: per prompt [I,R,R,3] pixels, uint8 or normalized float, that fill
      its `<img>` spans in reading order, or None; None for no images at all.
    seed: of sampling; the row's number is part of its seed, so that equal
      prompts differ. The same call gives the same answers.
    **sampling: see `Sampling`.

  Returns:
    The new ids of each prompt, in the order of `prompts`.

  Raises:
    DataError: a prompt or its images cannot be used; names the row.
    ConfigError: settings out of range.
    GenerationError: the model's output cannot be used; names the row.
  """
  images = prompts_lib.images_per_prompt(prompts, images)
  requests = [
    Request.create(
      engine.config,
      prompt,
      pixels,
      f'row {row}',
      max_new_tokens=max_new_tokens,
      sampling=Sampling(**sampling, seed=(seed, row)),
      adapter=adapter,
    )
    for row, (prompt, pixels) in enumerate(zip(prompts, images, strict=True))
  ]
  return [answer.ids for answer in run(engine, requests, progress)]


def run(
  engine: Engine,
  requests: Sequence[Request],
  progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
  """Answers requests, as many at a time as the engine has slots.

  Raises:
    DataError: the engine has no room for a request; names the row.
    GenerationError: the first request that could not be answered.
  """
  # Nobody waits for single tokens: all slots are filled before a step.
  scheduler = Scheduler(engine, read_tokens=engine.slots * engine.max_len)
  # Those of like length one after the other: they can be read together.
  order = sorted(
    range(len(requests)), key=lambda row: len(requests[row].tokens)
  )
  answers = [None] * len(requests)
  for row in order:
    answers[row] = scheduler.submit(requests[row], name=f'row {row}')
  while scheduler.step():
    progress(sum(answer.finished for answer in answers))
  for row, answer in enumerate(answers):
    if answer.error is not None:
      raise type(answer.error)(f'row {row}: {answer.error}') from answer.error
  return answers


def stream(scheduler: Scheduler, request: Request) -> Iterator[int]:
  """Answers one request and yields each id as soon as it is known.

  The prompt is checked at the call, and read when the first id is asked for.

  Returns:
    An iterator that may be left at any time, which cancels the request.

  Raises:
    DataError: the engine has no room for the request.
    GenerationError: from the iterator, where the model's output cannot be used.
  """
  engine = scheduler.engine
  check_fits(request, engine.max_len, engine.images, 'the prompt')

  def ids():
    # Not before somebody asks: nobody would cancel what was never begun.
    answer, told = scheduler.submit(request), 0
    try:
      while not answer.finished:
        scheduler.step()
        for token in answer.tokens[told:]:
          told += 1
          yield token.id
    finally:
      if not answer.finished:
        scheduler.cancel(answer)
        scheduler.step()
    if answer.error is not None:
      raise answer.error

  return ids()
