"""What is asked of the engine, and the answer as it comes."""

import dataclasses
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from qwenvl_jax.errors import ConfigError, DataError, QwenVLError
from qwenvl_jax.infer import prompts
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.state import Chosen, Scores
from qwenvl_jax.model.config import QwenVLConfig

_LOG = logging.getLogger(__name__)

# Most alternatives that can be told beside a token.
MAX_TOP_LOGPROBS = 20


class GenerationError(QwenVLError):
  """An answer that cannot be completed."""


class GrammarError(GenerationError):
  """An answer that the form asked for, not the model, does not let go on."""


def not_finite(count: int) -> GenerationError:
  """The error of logits that are NaN or infinite after `count` new tokens."""
  return GenerationError(
    f'the logits after {count} new tokens are not finite: the checkpoint '
    'is damaged, or its number format too small for it (try float32)'
  )


def failed(error: BaseException) -> GenerationError:
  """What the device, or a program on it, could not do."""
  text = ' '.join(str(error).split())
  return GenerationError(f'the engine could not go on: {text[:300]}')


class Matcher(Protocol):
  """What a grammar allows after the tokens so far (`infer.grammar`)."""

  finished: bool

  def fill(self, mask: np.ndarray) -> None:
    """Writes [ceil(V/32)] uint32, a bit for each id that may follow."""

  def accept(self, token: int) -> None:
    """Goes on after a token."""


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt, and how it is to be continued.

  Attributes:
    tokens: [T] ids.
    images: [R,R,3] uint8 or normalized float pixels for the prompt's `<img>`
      spans, in reading order.
    image_starts: for each image, the index of the first token that its
      features replace.
    max_new_tokens: most tokens of the answer; 0 only with `prompt_logprobs`.
    sampling: how tokens are chosen.
    prompt_logprobs: None, or how many of the most likely tokens are told beside
      each token of the prompt, whose log-probabilities the answer then has.
    top_logprobs: None for tokens only; else each comes with its log-probability
      and with so many of the most likely ones.
    matcher: of a grammar that the answer follows; used by this request alone.
    timeout: seconds after which the answer ends as it is; None for never.
    salt: image features are shared only between requests of the same salt.
    adapter: name of the low-rank adapter that answers, one of
      `Engine.adapters`; None for the model itself.
  """

  tokens: np.ndarray
  images: tuple[np.ndarray, ...] = ()
  image_starts: tuple[int, ...] = ()
  max_new_tokens: int = 512
  sampling: Sampling = Sampling()
  prompt_logprobs: int | None = None
  top_logprobs: int | None = None
  matcher: Matcher | None = None
  timeout: float | None = None
  salt: bytes = b''
  adapter: str | None = None

  @classmethod
  def create(
    cls,
    config: QwenVLConfig,
    tokens,
    images=None,
    name: str = 'the prompt',
    **settings,
  ) -> 'Request':
    """Makes a request that the model can read.

    Args:
      tokens: [T] ids.
      images: [I,R,R,3] pixels, an array or a list; None for none.
      **settings: the other attributes.

    Raises:
      DataError: no token, an unknown one, or images that do not fit the spans.
      ConfigError: settings out of range.
    """
    tokens = prompts.check_ids(tokens, config, name)
    starts = prompts.image_starts(tokens, config, name)
    images = tuple(prompts.match_images(starts, images, name))
    patch = config.vision.patch_size
    for number, image in enumerate(images, 1):
      if image.shape[0] % patch or image.shape[1] % patch:
        raise DataError(
          f'{name}: image {number} of {image.shape[0]}x{image.shape[1]} pixels '
          f'does not split into patches of {patch}; resize it to '
          f'{config.vision.image_size}'
        )
    request = cls(tokens, images, tuple(starts), **settings)
    request.sampling.check_ids(config.decoder.vocab_size)
    return request

  def __post_init__(self):
    if self.max_new_tokens or self.prompt_logprobs is None:
      prompts.check_count('max_new_tokens', self.max_new_tokens)
    for name in ('prompt_logprobs', 'top_logprobs'):
      top = getattr(self, name)
      if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise ConfigError(f'{name}={top} is not from 0 to {MAX_TOP_LOGPROBS}')
    if self.timeout is not None and not self.timeout > 0:
      raise ConfigError(f'timeout={self.timeout}: must be above 0 seconds')


class Token(NamedTuple):
  """One token of an answer.

  Attributes:
    id: of the vocabulary.
    logprob: log-probability by the model, None if not asked for.
    top: (id, log-probability) of the most likely tokens.
  """

  id: int
  logprob: float | None = None
  top: tuple[tuple[int, float], ...] = ()


# Why an answer ended.
STOP = 'stop'  # a stop id, or the end of the grammar
LENGTH = 'length'  # `max_new_tokens`
CANCELLED = 'cancelled'
TIMEOUT = 'timeout'
ERROR = 'error'


class Answer:
  """The answer to a request, growing.

  Attributes:
    request: what was asked.
    tokens: so far; without the stop id.
    finish_reason: None while it grows.
    prompt_scores: what the model says of the prompt's tokens after the first,
      where that was asked for and the prompt was read.
    error: what went wrong, where `finish_reason` is 'error'.
    abandoned: whether its listener failed, so that nobody hears of it.
  """

  def __init__(
    self, request: Request, listener: Callable[['Answer'], None] | None = None
  ):
    """Makes an empty answer.

    Args:
      listener: called in the scheduler's thread after each token, and when the
        answer ends.
    """
    self.request = request
    self.tokens: list[Token] = []
    self.finish_reason: str | None = None
    self.prompt_scores: Scores | None = None
    self.error: QwenVLError | None = None
    self.abandoned = False
    self._listener = listener

  @property
  def ids(self) -> list[int]:
    """Ids of the tokens so far."""
    return [token.id for token in self.tokens]

  @property
  def finished(self) -> bool:
    return self.finish_reason is not None

  def add(self, token: Token) -> None:
    """Appends a token."""
    self.tokens.append(token)
    self._tell()

  def finish(self, reason: str, error: QwenVLError | None = None) -> None:
    """Ends the answer."""
    self.error = error
    self.finish_reason = reason
    self._tell()

  def _tell(self) -> None:
    if self._listener is None:
      return
    try:
      self._listener(self)
    except Exception:
      # A listener that fails must not end the answers of others.
      _LOG.warning('the listener of an answer failed', exc_info=True)
      self._listener, self.abandoned = None, True


def check_fits(request: Request, max_len: int, images: int, name: str) -> None:
  """Checks that an engine has room for a request.

  Raises:
    DataError: says what is too much.
  """
  length = len(request.tokens)
  if length >= max_len:
    raise DataError(
      f'{name}: {length} tokens are more than the engine reads: prompt and '
      f'answer together have {max_len}; shorten the prompt'
    )
  if length + request.max_new_tokens > max_len:
    raise DataError(
      f'{name}: {length} prompt tokens and max_new_tokens='
      f'{request.max_new_tokens} are more than the {max_len} that there is '
      f'room for; shorten the prompt or ask for at most {max_len - length}'
    )
  if len(request.images) > images:
    raise DataError(
      f'{name}: {len(request.images)} images are more than the {images} that '
      'the engine keeps features of; show fewer'
    )


def told_token(
  request: Request, token: int, chosen: Chosen, slot: int
) -> Token:
  """A token with what its request asked to be told."""
  count = request.top_logprobs
  if count is None:
    return Token(token)
  top = zip(chosen.top_ids[slot, :count], chosen.top_logprobs[slot, :count])
  return Token(
    token,
    float(chosen.logprobs[slot]),
    tuple((int(i), float(logprob)) for i, logprob in top),
  )


def check_chosen(chosen: Chosen, slot: int, count: int) -> None:
  """QwenVLError if a slot's token is none, after `count` new ones."""
  if not chosen.valid[slot]:
    raise not_finite(count)
  if not chosen.possible[slot]:
    raise GrammarError(
      f'no token may follow after {count} new ones: the grammar can only end '
      'there, which min_new_tokens forbids; ask for fewer'
    )
