"""Multiple choice by likelihood."""

import dataclasses
import string
from collections.abc import Sequence

from qwenvl_jax.eval.benchmark import Benchmark
from qwenvl_jax.eval.task import Example, Scores

LETTERS = string.ascii_uppercase

# Of ScienceQA and MMBench, behind the picture.
CONTEXT = 'Context: {}\nQuestion: {}\nOptions: {}\nAnswer:'

# What becomes of an answer, in words.
LIKELIEST = 'the letter of the smallest mean cross entropy'


@dataclasses.dataclass(frozen=True)
class Choices(Benchmark):
  """Questions whose answer is the likeliest letter after `Answer:`."""

  def parse(self, text: str, example: Example) -> str:
    """Returns the first letter that an option has; '' if there is none.

    The likeliest of the choices is a letter; what an endpoint without
    likelihoods writes begins with one.
    """
    del example
    letter = text.strip().lstrip('(')[:1]
    return letter if letter and letter in LETTERS else ''

  def score(self, answer: str, example: Example) -> Scores:
    return {'accuracy': float(answer == example.target)}


def lettered(options: Sequence[str]) -> str:
  """Returns options as lines: `A. this`."""
  return '\n'.join(
    f'{letter}. {option}' for letter, option in zip(LETTERS, options)
  )


def letters(count: int) -> tuple[str, ...]:
  """Returns the continuations that are scored: ` A`, ` B`, .."""
  return tuple(f' {letter}' for letter in LETTERS[:count])
