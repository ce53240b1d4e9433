"""What routes share: the model, the engine's thread, limits, counters."""

import asyncio
import dataclasses
import functools
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

from qwenvl_jax.infer.grammar import GrammarCompiler
from qwenvl_jax.infer.request import Request
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.serve.answering import Answers
from qwenvl_jax.serve.conversation import Prompt, build_prompt, check_messages
from qwenvl_jax.serve.limits import ApiError, Limits
from qwenvl_jax.serve.metrics import Metrics
from qwenvl_jax.serve.schemas import ChatRequest, TokenizeRequest
from qwenvl_jax.serve.worker import Worker
from qwenvl_jax.text.tokenizer import Tokenizer

# How often it is looked whether a client that waits has gone.
_POLL_SECONDS = 0.25


@dataclasses.dataclass(frozen=True)
class Server:
  """A model that is served.

  Attributes:
    name: that clients call it by.
    key: that they must send, None for none.
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

  @functools.cached_property
  def most_chars(self) -> int:
    """Characters of the longest text that fits the model's context."""
    return self.max_len * max(map(len, self.tokenizer.vocabulary))

  @property
  def models(self) -> list[dict[str, Any]]:
    """What clients may ask for, as OpenAI's API lists it."""
    return [
      {
        'id': name,
        'object': 'model',
        'created': 0,
        'owned_by': 'qwenvl_jax',
        'root': self.name,
        'parent': None if name == self.name else self.name,
        'max_model_len': self.max_len,
      }
      for name in (self.name, *self.worker.scheduler.engine.adapters)
    ]

  def adapter(self, model: str) -> str | None:
    """The adapter that the id of a model means, None for the model itself."""
    return None if model == self.name else model

  def find_model(self, name: str | None) -> dict[str, Any]:
    """The entry of `models` that a request names, the first for None.

    Raises:
      ApiError: there is none of this name.
    """
    for model in self.models:
      if name in (None, model['id']):
        return model
    names = ', '.join(repr(model['id']) for model in self.models)
    raise ApiError(
      f'there is no such model here; {names} is served',
      'model',
      status=404,
      kind='not_found_error',
      code='model_not_found',
    )

  def prompt(self, body: ChatRequest | TokenizeRequest) -> Prompt:
    """What the model reads of a conversation.

    Raises:
      ApiError: messages that make no sense, or too many.
    """
    check_messages(body.messages, self.limits, self.most_chars)
    return build_prompt(
      self.tokenizer,
      body.messages,
      self.config.adapter.queries,
      body.continue_final_message,
      body.add_generation_prompt,
      body.chat_template_kwargs.add_vision_id,
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
