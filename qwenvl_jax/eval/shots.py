"""Few-shot prompts: examples with their answers before the question."""

import random
from collections.abc import Sequence
from typing import TypeVar

from qwenvl_jax.errors import DataError

T = TypeVar('T')

# How many the paper's Figure 4 has.
NUMBERS = (1, 2, 4, 8)


def draw(pool: Sequence[T], count: int, seed: int, key: str) -> list[T]:
  """Draws examples for a question, the same in every run.

  The release draws with one generator for all questions, so that its examples
  depend on the number of processes and workers; here they depend on the
  question's key.

  Raises:
    DataError: there are not so many.
  """
  if count > len(pool):
    raise DataError(
      f'{key}: {count} examples are to be drawn from {len(pool)}; the train '
      'split is cut off: download it again'
    )
  return random.Random(f'{seed}/{key}').sample(pool, count)
