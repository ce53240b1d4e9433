"""What answers look like, for `/docs` and the OpenAPI schema.

Answers are made as plain JSON where they arise; tests hold them against this.
"""

from typing import Any, Literal

import pydantic
from pydantic import BaseModel, Field

_Reason = Literal['stop', 'length']


class ErrorDetails(BaseModel):
  """What is wrong, as OpenAI's API says it."""

  message: str
  type: str = Field(examples=['invalid_request_error'])
  param: str | None = Field(description='The field that is wrong.')
  code: str | None = Field(examples=['context_length_exceeded'])


class Error(BaseModel):
  """Any answer that is not 200."""

  error: ErrorDetails


class Usage(BaseModel):
  """Tokens that were read and written."""

  prompt_tokens: int
  completion_tokens: int
  total_tokens: int


class Place(BaseModel):
  """A place that an answer names, in pixels of the picture sent."""

  model_config = pydantic.ConfigDict(
    json_schema_extra={
      'example': {'ref': 'the dog', 'picture': 1, 'box': [12, 30, 51.8, 96.6]}
    }
  )
  ref: str = Field(description="The phrase, '' for none.")
  picture: int = Field(description='Its number, from 1.')
  box: list[float] = Field(
    default_factory=list, description='x1, y1, x2, y2, if it is a box.'
  )
  quad: list[float] = Field(
    default_factory=list, description='x1, y1, .., y4, if it has four corners.'
  )


class AnswerMessage(BaseModel):
  """What the model says."""

  role: Literal['assistant']
  content: str
  refusal: None
  boxes: list[Place]


class TokenLogprob(BaseModel):
  """A token and its log-probability."""

  token: str
  logprob: float
  bytes: list[int]


class TopLogprobs(TokenLogprob):
  """A token of the answer, and the most likely ones in its place."""

  top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
  """Of all tokens of an answer."""

  content: list[TopLogprobs]
  refusal: None


class ChatChoice(BaseModel):
  """One of `n` answers."""

  index: int
  message: AnswerMessage
  logprobs: ChatLogprobs | None
  finish_reason: _Reason


class ChatCompletion(BaseModel):
  """The answers to a conversation."""

  id: str
  object: Literal['chat.completion']
  created: int
  model: str
  choices: list[ChatChoice]
  usage: Usage


class TextLogprobs(BaseModel):
  """Of all tokens of a text; the first one of a prompt has none."""

  tokens: list[str]
  token_logprobs: list[float | None]
  top_logprobs: list[dict[str, float] | None]
  text_offset: list[int]


class TextChoice(BaseModel):
  """One continuation."""

  index: int
  text: str
  logprobs: TextLogprobs | None
  finish_reason: _Reason


class TextCompletion(BaseModel):
  """The continuations of prompts."""

  id: str
  object: Literal['text_completion']
  created: int
  model: str
  choices: list[TextChoice]
  usage: Usage


class Model(BaseModel):
  """A model that requests may name."""

  id: str
  object: Literal['model']
  created: int
  owned_by: str
  root: str
  parent: str | None = Field(description='The model that an adapter belongs to')
  max_model_len: int = Field(description='Tokens of prompt and answer.')


class Models(BaseModel):
  """All of them."""

  object: Literal['list']
  data: list[Model]


class Tokens(BaseModel):
  """Ids of a text."""

  count: int
  max_model_len: int
  tokens: list[int]


class Text(BaseModel):
  """The text of ids."""

  prompt: str


class Version(BaseModel):
  """Of the package."""

  version: str


# What every route may answer beside 200.
ERRORS: dict[int | str, dict[str, Any]] = {
  401: {'model': Error, 'description': 'The API key is missing or wrong.'},
  'default': {'model': Error, 'description': 'Any other error.'},
}
# And those that read a body.
BODY_ERRORS: dict[int | str, dict[str, Any]] = {
  400: {'model': Error, 'description': 'The request makes no sense.'},
  404: {'model': Error, 'description': 'No such model is served.'},
  413: {'model': Error, 'description': 'The body is too large.'},
}
# And those that ask the model.
ANSWER_ERRORS = BODY_ERRORS | {
  429: {
    'model': Error,
    'description': 'Too many are waiting: come back after Retry-After.',
  },
}


def streamed(model: type[BaseModel], example: str) -> dict[str, Any]:
  """What an answer of 200 is, whole or as server-sent events.

  Args:
    example: the data of the first event.
  """
  schema = {'type': 'string', 'example': f'data: {example}\n\ndata: [DONE]\n\n'}
  return {
    'model': model,
    'description': 'The answer, or with stream=true its events.',
    'content': {'text/event-stream': {'schema': schema}},
  }
