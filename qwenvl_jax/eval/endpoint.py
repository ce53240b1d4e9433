"""An OpenAI endpoint as what answers examples.

The server of this project continues raw prompts with pictures
(`/v1/completions` with `images`) and scores choices. Others know pictures only
in chats: there, raw prompts are sent as a user's message, and choices are read
from what is said.
"""

import base64
import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import openai

from qwenvl_jax.errors import ConfigError, QwenVLError, did_you_mean
from qwenvl_jax.eval.answering import (
  Ahead,
  Problem,
  Reply,
  likeliest,
  seed_of,
)
from qwenvl_jax.eval.task import Decoding, Example, Picture

# Where a picture stands in a raw prompt.
_PICTURE = '<img></img>'

# Of a request, each after a longer pause: the server is busy, or gone for a
# moment.
_RETRIES = 5

# What an example's own request may be refused with.
_REFUSED = (
  openai.BadRequestError,
  openai.UnprocessableEntityError,
  openai.ConflictError,
)


class EndpointError(QwenVLError):
  """An endpoint that does not answer."""


class Endpoint:
  """Answers by HTTP, many requests at a time."""

  def __init__(
    self,
    base_url: str,
    *,
    key: str | None = None,
    model: str | None = None,
    requests: int = 32,
    as_chat: bool = False,
  ):
    """Connects.

    Args:
      base_url: with `/v1`, as OpenAI's client wants it.
      key: of the API, None for none.
      model: its name, None for the first that the endpoint lists.
      requests: at a time.
      as_chat: send raw prompts as chats: for servers other than ours.

    Raises:
      EndpointError: nobody answers there.
      ConfigError: no address of an API, a model that it does not have, or a
        server that would not see the pictures of raw prompts.
    """
    if not base_url.startswith(('http://', 'https://')):
      raise ConfigError(
        f'--base_url={base_url} is no address, as http://127.0.0.1:8000/v1'
      )
    self._client = openai.OpenAI(
      base_url=base_url, api_key=key or 'none', max_retries=_RETRIES
    )
    self._url, self._requests, self._as_chat = base_url, requests, as_chat
    self._counts: dict[str, int] = {}
    try:
      models = list(self._client.models.list())
    except openai.NotFoundError as error:
      raise ConfigError(
        f'{base_url} has no list of models: is it the address of an API, as '
        'http://127.0.0.1:8000/v1?'
      ) from error
    except openai.OpenAIError as error:
      raise self._failed(error) from error
    if model is None and not models:
      raise ConfigError(f'{base_url} lists no model; name one with --model')
    self._model = model or models[0].id
    owners = {one.id: one.owned_by for one in models}
    if 'qwenvl_jax' in owners.values() and self._model not in owners:
      raise ConfigError(
        f'--model={self._model}: {base_url} has no such model'
        + did_you_mean(self._model, owners)
      )
    self._ours = owners.get(self._model) == 'qwenvl_jax'
    if not self._ours and not as_chat:
      raise ConfigError(
        f'{base_url} is another server than qwenvl-serve, which may not see '
        'the pictures of raw prompts: --as_chat sends these as chats'
      )

  def identity(self) -> dict[str, Any]:
    return {
      'base_url': self._url,
      'model': self._model,
      'as_chat': self._as_chat,
    }

  def answer(
    self, examples: Iterable[Example], decoding: Decoding
  ) -> Iterator[tuple[Example, Reply | Problem]]:
    ahead = Ahead(
      lambda example: (example, self._ask(example, decoding)),
      *(examples, self._requests, 2 * self._requests),
    )
    try:
      while ahead.left:
        yield from ahead.take(self._requests, least=1)
    finally:
      ahead.close()

  def _ask(self, example: Example, decoding: Decoding) -> Reply | Problem:
    try:
      urls = [_data_url(picture) for picture in example.prompt.pictures]
    except QwenVLError as error:
      return Problem.of(error)
    chat = example.prompt.chat or self._as_chat
    try:
      if not example.choices:
        say = self._chat if chat else self._complete
        return Reply(say(example, urls, decoding))
      if chat:
        return self._read_choice(example, urls, decoding)
      return likeliest(
        example, [self._loss(example, urls, x) for x in example.choices]
      )
    except _REFUSED as error:
      return Problem('refused', f'{example.key}: {_message(error)}')
    except openai.OpenAIError as error:
      raise self._failed(error) from error

  def _complete(
    self, example: Example, urls: list[str], decoding: Decoding
  ) -> str:
    found = self._client.completions.create(
      model=self._model,
      prompt=_raw(example),
      max_tokens=decoding.max_tokens,
      **_settings(example, decoding, {'images': urls} if urls else {}),
    )
    return found.choices[0].text

  def _chat(self, example: Example, urls: list[str], decoding: Decoding) -> str:
    prompt = example.prompt
    # Our server numbers pictures itself, and others in their own way.
    more = {}
    if self._ours and prompt.chat and not prompt.numbered:
      more['chat_template_kwargs'] = {'add_vision_id': False}
    left = iter(urls)
    content = [
      {'type': 'text', 'text': part}
      if isinstance(part, str)
      else {'type': 'image_url', 'image_url': {'url': next(left)}}
      for part in prompt.parts
    ]
    messages = [{'role': 'user', 'content': content}]
    if prompt.system is not None:
      messages.insert(0, {'role': 'system', 'content': prompt.system})
    found = self._client.chat.completions.create(
      model=self._model,
      messages=messages,
      max_tokens=decoding.max_tokens,
      **_settings(example, decoding, more),
    )
    return found.choices[0].message.content or ''

  def _read_choice(
    self, example: Example, urls: list[str], decoding: Decoding
  ) -> Reply:
    """The choice that an answer begins with; else the answer."""
    said = self._chat(example, urls, decoding)
    for choice in example.choices:
      if said.strip().startswith(choice.strip()):
        return Reply(choice)
    return Reply(said)

  def _loss(self, example: Example, urls: list[str], choice: str) -> float:
    """Mean cross entropy of the tokens of a choice after the prompt."""
    found = self._client.completions.create(
      model=self._model,
      prompt=_raw(example) + choice,
      max_tokens=0,
      echo=True,
      logprobs=0,
      temperature=0,
      extra_body={'images': urls} if urls else None,
    )
    logprobs = found.choices[0].logprobs.token_logprobs
    return -float(np.mean(logprobs[-self._count(choice) :], dtype=np.float64))

  def _count(self, choice: str) -> int:
    """Tokens of a choice, as our server counts them."""
    if choice not in self._counts:
      found = self._client.post(
        self._url.rstrip('/').removesuffix('/v1') + '/tokenize',
        body={'prompt': choice},
        cast_to=object,
      )
      self._counts[choice] = found['count']
    return self._counts[choice]

  def _failed(self, error: Exception) -> EndpointError:
    return EndpointError(
      f'{self._url}: {_message(error)}; once it answers, the same command goes '
      'on from here'
    )


def _raw(example: Example) -> str:
  return ''.join(
    part if isinstance(part, str) else _PICTURE for part in example.prompt.parts
  )


def _settings(
  example: Example, decoding: Decoding, more: dict[str, Any]
) -> dict[str, Any]:
  """Arguments of both kinds of request; those of ours alone where needed."""
  if decoding.min_tokens:
    more = more | {'min_tokens': decoding.min_tokens}
  return {
    'temperature': decoding.temperature,
    'top_p': decoding.top_p,
    'seed': seed_of(example, decoding),
    'stop': list(decoding.stop) or None,
    'extra_body': more or None,
  }


def _data_url(picture: Picture) -> str:
  """A picture as it would be decoded here, without loss."""
  encoded = io.BytesIO()
  picture.open().save(encoded, 'png', compress_level=1)
  data = base64.b64encode(encoded.getvalue()).decode()
  return f'data:image/png;base64,{data}'


def _message(error: Exception) -> str:
  body = getattr(error, 'body', None)
  if isinstance(body, dict) and body.get('message'):
    return str(body['message'])
  cause = error.__cause__ or error
  return ' '.join(str(cause).split())[:300]
