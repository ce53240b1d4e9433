"""How likely the model finds given continuations."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.errors import DataError
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.image_bank import ImageBank
from qwenvl_jax.infer.reading import Reading
from qwenvl_jax.infer.request import MAX_TOP_LOGPROBS, Request, check_fits


class Scored(NamedTuple):
  """What the model says of a continuation of C tokens.

  Attributes:
    logprobs: [C] float32, log-probability of each token.
    top_ids: [C,K] int32, the most likely tokens in their places.
    top_logprobs: [C,K] float32.
  """

  logprobs: np.ndarray
  top_ids: np.ndarray
  top_logprobs: np.ndarray


def score(
  engine: Engine,
  prompts: Sequence[Sequence[int]],
  continuations: Sequence[Sequence[int]],
  images: Sequence | None = None,
  *,
  top: int = 0,
  adapter: str | None = None,
) -> list[Scored]:
  """Scores a continuation of every prompt.

  Args:
    engine: with room for the longest prompt with its continuation.
    prompts: token ids, at least one each.
    continuations: token ids, one list a prompt.
    images: per prompt [I,R,R,3] pixels or None; or None.
    top: how many of the most likely tokens to tell beside each.
    adapter: see `Request`.

  Returns:
    One `Scored` a prompt. NTK and LogN follow the length of prompt and
    continuation together, which are read as one.

  Raises:
    DataError: a prompt, a continuation or images that cannot be used; names
      the row.
    ConfigError: there is no such adapter.
  """
  images = [None] * len(prompts) if images is None else list(images)
  if not len(prompts) == len(continuations) == len(images):
    raise DataError(
      f'{len(prompts)} prompts, {len(continuations)} continuations and images '
      f'for {len(images)}; give as many of each'
    )
  engine.check_adapter(adapter)
  if not 0 <= top <= MAX_TOP_LOGPROBS:
    raise DataError(f'top={top} is not from 0 to {MAX_TOP_LOGPROBS}')
  requests = []
  for row, (prompt, more, pixels) in enumerate(
    zip(prompts, continuations, images)
  ):
    if not len(prompt):
      raise DataError(f'row {row}: the prompt is empty; give at least one id')
    tokens = [*prompt, *more]
    request = Request.create(
      engine.config,
      tokens,
      pixels,
      f'row {row}',
      max_new_tokens=1,
      adapter=adapter,
    )
    check_fits(request, engine.max_len + 1, engine.images, f'row {row}')
    requests.append(request)
  bank = ImageBank(engine)
  results = []
  for request, prompt in zip(requests, prompts):
    reading = Reading(engine, bank, [request], top)
    while not reading.finished:
      reading.step()
    results.append(Scored(*(x[len(prompt) - 1 :] for x in reading.scores())))
    reading.release()
  return results
