"""How likely the model finds given continuations."""

from collections.abc import Sequence

from qwenvl_jax.errors import DataError
from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.image_bank import ImageBank
from qwenvl_jax.infer.reading import Reading
from qwenvl_jax.infer.request import MAX_TOP_LOGPROBS, Request, check_fits
from qwenvl_jax.infer.state import Scores


def score(
  engine: Engine,
  prompts: Sequence[Sequence[int]],
  continuations: Sequence[Sequence[int]],
  images: Sequence | None = None,
  *,
  top: int = 0,
  adapter: str | None = None,
) -> list[Scores]:
  """Scores a continuation of every prompt.

  Args:
    continuations: token ids, one list a prompt.
    top: how many of the most likely tokens to tell beside each.

  Returns:
    The scores of each continuation. NTK and LogN follow the length of prompt
    and continuation together, which are read as one.

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
    results.append(Scores(*(x[len(prompt) - 1 :] for x in reading.scores())))
    reading.release()
  return results
