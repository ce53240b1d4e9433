"""What answers examples: the engine in this process, or an OpenAI endpoint."""

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from qwenvl_jax.errors import BadRecordError, DataError, QwenVLError
from qwenvl_jax.eval.task import Decoding, Example


class Reply(NamedTuple):
  """What was said to an example.

  Attributes:
    text: without the end token and what follows a stop text; of choices the
      likeliest.
    losses: mean cross entropy of each choice, in nats.
  """

  text: str
  losses: tuple[float, ...] = ()


class Problem(NamedTuple):
  """Why an example has no answer.

  Attributes:
    reason: a word to count by.
    message: names what is wrong.
  """

  reason: str
  message: str

  @classmethod
  def of(cls, error: QwenVLError) -> 'Problem':
    """The problem that an error tells of."""
    if isinstance(error, BadRecordError):
      return cls(error.reason, str(error))
    reason = 'unusable' if isinstance(error, DataError) else 'generation'
    if 'no such file' in str(error):
      reason = 'missing_picture'
    return cls(reason, str(error))


class Model(Protocol):
  """What answers."""

  def answer(
    self, examples: Iterable[Example], decoding: Decoding
  ) -> Iterator[tuple[Example, Reply | Problem]]:
    """Answers examples, each as if it were alone, in any order."""

  def identity(self) -> dict[str, Any]:
    """What another model, or other settings, would say otherwise."""


def seed_of(example: Example, decoding: Decoding) -> int:
  """The seed of an example's sampling, from 0 to below 2**62."""
  data = f'{decoding.seed}\0{example.key}'.encode()
  return int.from_bytes(hashlib.sha256(data).digest()[:8]) % 2**62


def cut(text: str, stops: Sequence[str]) -> str:
  """A text up to the first of some stop texts."""
  found = [place for stop in stops if (place := text.find(stop)) >= 0]
  return text[: min(found)] if found else text


def likeliest(example: Example, losses: Sequence[float]) -> Reply:
  """The choice of the least loss; of equals the first."""
  best = min(range(len(losses)), key=losses.__getitem__)
  return Reply(example.choices[best], tuple(losses))


class Ahead:
  """Calls a function in threads ahead of where its results are taken.

  Results come in the order of the inputs, and few wait at a time.
  """

  def __init__(
    self, function: Callable, inputs: Iterable, threads: int, most: int
  ):
    """Begins.

    Args:
      most: results that may wait.
    """
    self._function, self._inputs, self._most = function, iter(inputs), most
    self._pool = ThreadPoolExecutor(threads)
    self._futures: collections.deque[Future] = collections.deque()
    self._fill()

  def _fill(self) -> None:
    while len(self._futures) < self._most:
      try:
        found = next(self._inputs)
      except StopIteration:
        return
      self._futures.append(self._pool.submit(self._function, found))

  def take(self, most: int, least: int = 0) -> list:
    """Takes results that are there.

    Args:
      most: so many at most.
      least: so many are waited for, or all if fewer are to come.
    """
    found = []
    while self._futures and len(found) < most:
      if len(found) >= least and not self._futures[0].done():
        break
      found.append(self._futures.popleft().result())
      self._fill()
    return found

  @property
  def left(self) -> bool:
    """Whether results are to come."""
    return bool(self._futures)

  def close(self) -> None:
    """Lets go of the threads."""
    self._pool.shutdown(wait=False, cancel_futures=True)
