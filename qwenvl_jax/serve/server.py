"""What routes share: the model, the engine's thread, limits, counters."""

import asyncio
import dataclasses
import hashlib
import hmac
from collections.abc import Sequence

from qwenvl_jax.infer.grammar import GrammarCompiler
from qwenvl_jax.infer.request import Request
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.serve.answering import Answers
from qwenvl_jax.serve.limits import ApiError, Limits
from qwenvl_jax.serve.metrics import Metrics
from qwenvl_jax.serve.worker import Worker
from qwenvl_jax.text.tokenizer import Tokenizer

# How often it is looked whether a client that waits has gone.
_POLL_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Server:
  """A model that is served.

  Attributes:
    name: that clients call it by.
    config: of the model.
    tokenizer: its vocabulary.
    compiler: of grammars.
    worker: what answers.
    metrics: what is counted.
    limits: of a request.
    key: that clients must send, None for none.
  """

  name: str
  config: QwenVLConfig
  tokenizer: Tokenizer
  compiler: GrammarCompiler
  worker: Worker
  metrics: Metrics
  limits: Limits
  key: str | None = None

  @property
  def max_len(self) -> int:
    """Tokens of a prompt and its answer."""
    return self.worker.scheduler.engine.max_len

  def check_model(self, name: str | None) -> None:
    """ApiError if a request is for another model."""
    if name not in (None, self.name):
      raise ApiError(
        f'there is no such model here; {self.name!r} is served',
        'model',
        status=404,
        kind='not_found_error',
        code='model_not_found',
      )

  def check_key(self, header: str | None) -> bytes:
    """Checks an Authorization header; returns the salt of its requests.

    Raises:
      ApiError: another key than the server's, or none.
    """
    if self.key is None:
      return b''
    scheme, _, given = (header or '').partition(' ')
    digests = [
      hashlib.sha256(key.encode('utf-8', 'replace')).digest()
      for key in (given.strip(), self.key)
    ]
    # Both are looked at, whatever the scheme is.
    equal = hmac.compare_digest(*digests)
    if not equal or scheme.lower() != 'bearer':
      raise ApiError(
        'a valid API key is needed: Authorization: Bearer KEY',
        status=401,
        code='invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )
    return digests[0]

  def ask(self, requests: Sequence[Request], stops: Sequence[str]) -> Answers:
    """Puts requests to the engine.

    Raises:
      ApiError: it has no room for them.
    """
    return Answers(self.worker, self.metrics, self.tokenizer, requests, stops)


async def finish(answers: Answers, gone) -> None:
  """Waits until all answers have ended; cancels them if nobody waits.

  Args:
    answers: to wait for.
    gone: coroutine function that tells whether the client has gone.

  Raises:
    ApiError: the engine could not answer, or the client has gone.
  """

  async def collect():
    async for _ in answers.pieces():
      pass

  task = asyncio.create_task(collect())
  try:
    while True:
      done, _ = await asyncio.wait({task}, timeout=_POLL_SECONDS)
      if done:
        return task.result()
      if await gone():
        raise ApiError(
          'the client has gone', status=499, kind='cancelled_error'
        )
  finally:
    task.cancel()
    answers.cancel()
