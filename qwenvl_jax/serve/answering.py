"""Answers of the engine as OpenAI's JSON, whole or streamed."""

import asyncio
import dataclasses
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from qwenvl_jax.errors import DataError
from qwenvl_jax.infer import request as engine_request
from qwenvl_jax.infer.request import Request, Token
from qwenvl_jax.infer.scheduler import QueueFullError
from qwenvl_jax.serve.limits import ApiError, busy
from qwenvl_jax.serve.metrics import Metrics
from qwenvl_jax.serve.worker import Listening, Worker
from qwenvl_jax.serve.writing import Writer
from qwenvl_jax.text.tokenizer import Tokenizer

# What OpenAI calls the ends of answers.
_REASONS = {
  engine_request.STOP: 'stop',
  engine_request.LENGTH: 'length',
  engine_request.TIMEOUT: 'length',
}

# JSON has no -Infinity; this is what others write for it.
_LEAST = -9999.0


@dataclasses.dataclass
class Choice:
  """One answer to a prompt, as it grows.

  Attributes:
    index: among the answers of the request.
    listening: to the engine.
    writer: makes its text.
    finish_reason: OpenAI's; None while it grows.
    tokens: those whose text was given out.
  """

  index: int
  listening: Listening
  writer: Writer
  finish_reason: str | None = None
  tokens: list[Token] = dataclasses.field(default_factory=list)
  taken: int = 0


class Answers:
  """The answers to one request of the API."""

  def __init__(
    self,
    worker: Worker,
    metrics: Metrics,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    stops: Sequence[str],
  ):
    """Puts all requests into the queue, or none.

    Raises:
      ApiError: there is no room for them.
    """
    self._began = time.monotonic()
    self._metrics = metrics
    self.choices: list[Choice] = []
    try:
      for index, request in enumerate(requests):
        listening = worker.submit(request)
        writer = Writer(tokenizer, stops)
        self.choices.append(Choice(index, listening, writer))
    except QueueFullError as error:
      self.cancel()
      raise busy() from error
    except DataError as error:
      self.cancel()
      raise ApiError(str(error)) from error

  def cancel(self) -> None:
    """Ends all answers and frees their slots."""
    for choice in self.choices:
      choice.listening.cancel()

  async def pieces(self) -> AsyncIterator[tuple[Choice, str, list[Token]]]:
    """Yields (choice, its next text, the tokens of that), in any order.

    The last one of a choice comes with its `finish_reason`. Left early, all
    answers are cancelled.

    Raises:
      ApiError: the engine could not answer.
    """
    queue: asyncio.Queue = asyncio.Queue()
    tasks = [
      asyncio.create_task(self._follow(choice, queue))
      for choice in self.choices
    ]
    left = len(tasks)
    try:
      while left:
        found = await queue.get()
        if isinstance(found, Exception):
          raise found
        choice, _, _ = found
        left -= choice.finish_reason is not None
        yield found
    finally:
      for task in tasks:
        task.cancel()
      self.cancel()

  async def _follow(self, choice: Choice, queue: asyncio.Queue) -> None:
    answer, first = choice.listening.answer, None
    try:
      async for count in choice.listening.grown():
        if count and first is None:
          first = time.monotonic()
          self._metrics.first_token.observe(first - self._began)
        new = answer.tokens[choice.taken : count]
        choice.taken = count
        last = answer.finished and count == len(answer.tokens)
        if last and answer.finish_reason not in _REASONS:
          raise _failure(answer)
        piece = choice.writer.add(new, last)
        choice.tokens += piece.tokens
        if choice.writer.stopped:
          choice.finish_reason = 'stop'
          choice.listening.cancel()
        elif last:
          choice.finish_reason = _REASONS[answer.finish_reason]
        if piece.text or choice.finish_reason:
          queue.put_nowait((choice, piece.text, piece.tokens))
        if choice.finish_reason:
          break
      self._count(choice, first)
    except Exception as error:
      queue.put_nowait(error)

  def _count(self, choice: Choice, first: float | None) -> None:
    metrics, now = self._metrics, time.monotonic()
    metrics.prompt_tokens.inc(len(choice.listening.answer.request.tokens))
    metrics.generation_tokens.inc(choice.taken)
    metrics.latency.observe(now - self._began)
    if choice.taken > 1:
      metrics.inter_token.observe((now - first) / (choice.taken - 1))
    metrics.success(choice.finish_reason).inc()

  def usage(self, prompts: int = 1) -> dict[str, int]:
    """Tokens of the prompts, once each, and of all answers."""
    every = len(self.choices) // prompts
    read = sum(
      len(choice.listening.answer.request.tokens)
      for choice in self.choices[::every]
    )
    written = sum(choice.taken for choice in self.choices)
    return {
      'prompt_tokens': read,
      'completion_tokens': written,
      'total_tokens': read + written,
    }


def _failure(answer) -> ApiError:
  if answer.finish_reason == engine_request.CANCELLED:
    return ApiError(
      'the answer was cancelled', status=499, kind='cancelled_error'
    )
  if isinstance(answer.error, engine_request.GrammarError):
    return ApiError(str(answer.error)[:500], code='generation_failed')
  return ApiError(
    'the model could not answer this request',
    status=500,
    kind='server_error',
    code='generation_failed',
  )


def head(kind: str, model: str) -> dict[str, Any]:
  """The fields that answers begin with: `id`, `object`, `created`, `model`."""
  prefix = 'cmpl' if kind == 'text_completion' else 'chatcmpl'
  return {
    'id': f'{prefix}-{uuid.uuid4().hex}',
    'object': kind,
    'created': int(time.time()),
    'model': model,
  }


def event(data: Any) -> str:
  """One server-sent event."""
  text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
  return f'data: {text}\n\n'


async def stream(
  answers: Answers,
  about: dict[str, Any],
  chunk: Callable[[Choice, str, list[Token]], dict],
  first: Sequence[dict] = (),
  usage: Callable[[], dict] | None = None,
) -> AsyncIterator[str]:
  """Server-sent events of growing answers.

  Args:
    chunk: makes the entry of `choices` of a piece.
    first: entries that are sent before any piece, one a choice.
    usage: tells the tokens at the end; None if nobody asked.
  """
  none = {'usage': None} if usage else {}
  try:
    for entry in first:
      yield event(about | {'choices': [entry]} | none)
    async for choice, text, tokens in answers.pieces():
      yield event(about | {'choices': [chunk(choice, text, tokens)]} | none)
    if usage:
      yield event(about | {'choices': [], 'usage': usage()})
  except ApiError as error:
    yield event(error.body())
  finally:
    answers.cancel()
  yield event('[DONE]')


class TokenTexts:
  """Tokens as the API writes them beside log-probabilities."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer

  def text(self, token: int) -> str:
    """The characters of a token, U+FFFD for parts of one."""
    return self._tokenizer.decode_bytes([token]).decode('utf-8', 'replace')

  def _entry(self, token: int, logprob: float) -> dict:
    return {
      'token': self.text(token),
      'logprob': max(logprob, _LEAST),
      'bytes': [*self._tokenizer.decode_bytes([token])],
    }

  def chat(self, tokens: Sequence[Token]) -> dict:
    """`logprobs` of a chat's choice."""
    return {
      'content': [
        self._entry(token.id, token.logprob)
        | {'top_logprobs': [self._entry(*one) for one in token.top]}
        for token in tokens
      ],
      'refusal': None,
    }

  def completion(self, tokens: Sequence[Token], offset: int) -> dict:
    """`logprobs` of a completion's choice, whose text begins at `offset`."""
    texts = [self.text(token.id) for token in tokens]
    starts = itertools.accumulate(map(len, texts), initial=offset)
    offsets = [*starts][:-1]
    return {
      'tokens': texts,
      'token_logprobs': [token.logprob for token in tokens],
      'top_logprobs': [
        None
        if token.logprob is None
        else {self.text(i): max(logprob, _LEAST) for i, logprob in token.top}
        for token in tokens
      ],
      'text_offset': offsets,
    }
