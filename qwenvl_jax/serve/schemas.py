"""Bodies of requests, as OpenAI's API and vLLM's additions to it name them.

A field that is not known is refused: an answer that ignores what was asked for
is worse than an error. A field that is null asks for nothing.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from qwenvl_jax.infer.request import MAX_TOP_LOGPROBS
from qwenvl_jax.infer.sampling import MAX_BIASES

# Ids are 32-bit; longer lists than any model reads are refused early.
_Id = Annotated[int, Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_Id], Field(min_length=1, max_length=2**17)]
_Text = Annotated[str, Field(max_length=2**20)]

# A picture of one pixel, for examples.
_DOT = (
  'data:image/gif;base64,R0lGODlhAQABAIAAAP8AAP///yH5BAAAAAAALAAAAAABAAEAAAICRA'
  'EAOw=='
)


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid')

  @pydantic.model_validator(mode='before')
  @classmethod
  def _without_nulls(cls, found: Any) -> Any:
    """Clients write out what was not asked for, in answers sent back too."""
    if not isinstance(found, dict):
      return found
    return {key: value for key, value in found.items() if value is not None}


class TextPart(_Strict):
  """Words of a message."""

  type: Literal['text']
  text: _Text


class ImageUrl(_Strict):
  """Where a picture is: `data:`, or what the server allows.

  `detail` is accepted and makes no difference: the model sees one size.
  """

  url: str
  detail: Literal['auto', 'low', 'high'] | None = None


class ImagePart(_Strict):
  """A picture of a message."""

  type: Literal['image_url']
  image_url: ImageUrl | str

  @property
  def url(self) -> str:
    return url_of(self.image_url)


def url_of(found: ImageUrl | str) -> str:
  """Returns the address of a picture."""
  return found if isinstance(found, str) else found.url


Part = Annotated[TextPart | ImagePart, Field(discriminator='type')]


class Message(_Strict):
  """One turn. Pictures are the user's."""

  role: Literal['system', 'developer', 'user', 'assistant']
  content: _Text | list[Part] | None = None
  name: str | None = Field(None, max_length=64)
  refusal: None = None
  boxes: Any = Field(
    None, description='Of an answer that is sent back: unused.'
  )


class StreamOptions(_Strict):
  """What is streamed beside the answer."""

  include_usage: bool = False


class JsonSchema(_Strict):
  """A named JSON schema."""

  name: str | None = None
  description: str | None = None
  schema_: dict[str, Any] = Field(alias='schema')
  strict: bool | None = None


class ResponseFormat(_Strict):
  """The form of an answer."""

  type: Literal['text', 'json_object', 'json_schema']
  json_schema: JsonSchema | None = None


class Boxes(_Strict):
  """An answer of boxes alone, see `infer.grammar`."""

  max_boxes: int = Field(1, ge=1, le=256)
  ref: bool | str = False
  max_refs: int = Field(1, ge=1, le=256)


class StructuredOutputs(_Strict):
  """The form of an answer: one of these."""

  json_: dict[str, Any] | str | None = Field(None, alias='json')
  regex: str | None = None
  choice: list[str] | None = None
  boxes: Boxes | bool | None = None


class Settings(_Strict):
  """What chats and completions have in common."""

  model: str | None = None
  temperature: float = Field(1.0, ge=0, le=2, description='0 is greedy.')
  top_p: float | None = Field(
    None, gt=0, le=1, description="0.3 if not given, as in the model's release."
  )
  top_k: int = Field(0, ge=-1, description='0 or -1 for all tokens.')
  min_p: float = Field(
    0.0, ge=0, le=1, description="Least share of the most likely token's."
  )
  n: int = Field(1, ge=1, description='Answers.')
  seed: int | None = Field(
    None,
    ge=-(2**63),
    lt=2**63,
    description='The same one gives the same answer.',
  )
  stop: str | list[str] | None = Field(
    None, description='Texts that end an answer, and are not part of it.'
  )
  stop_token_ids: list[_Id] = Field(default_factory=list, max_length=8)
  ignore_eos: bool = Field(False, description='Go on to `max_tokens`.')
  min_tokens: int = Field(0, ge=0, lt=2**31)
  presence_penalty: float = Field(0.0, ge=-2, le=2)
  frequency_penalty: float = Field(0.0, ge=-2, le=2)
  repetition_penalty: float = Field(1.0, gt=0.001, lt=1000)
  logit_bias: dict[str, float] | None = Field(None, max_length=MAX_BIASES)
  stream: bool = Field(False, description='Answer by server-sent events.')
  stream_options: StreamOptions | None = None
  response_format: ResponseFormat | None = None
  structured_outputs: StructuredOutputs | None = None
  user: str | None = Field(None, description='Unused.')


class TemplateOptions(_Strict):
  """How a conversation is written down."""

  add_vision_id: bool = Field(
    True,
    description='Number pictures, a line each: `Picture 1: `. Without, a '
    'message is its parts as they are.',
  )


class ChatRequest(Settings):
  """Body of `/v1/chat/completions`."""

  messages: list[Message] = Field(min_length=1)
  max_tokens: int | None = Field(
    None,
    ge=1,
    lt=2**31,
    description='As many as there is room for if not given.',
  )
  max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
  logprobs: bool = False
  top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
  continue_final_message: bool = Field(
    False, description='The last message is the beginning of the answer.'
  )
  add_generation_prompt: bool = True
  chat_template_kwargs: TemplateOptions = TemplateOptions()
  store: Literal[False] | None = None
  metadata: dict[str, str] | None = Field(None, description='Unused.')

  model_config = pydantic.ConfigDict(
    extra='forbid',
    json_schema_extra={
      'examples': [
        {
          'messages': [{'role': 'user', 'content': 'What can you see?'}],
          'max_tokens': 64,
        },
        {
          'messages': [
            {
              'role': 'user',
              'content': [
                {'type': 'image_url', 'image_url': {'url': _DOT}},
                {'type': 'text', 'text': 'Where is the dog?'},
              ],
            }
          ],
          'temperature': 0,
          'structured_outputs': {'boxes': {'ref': 'the dog'}},
        },
      ]
    },
  )


class CompletionRequest(Settings):
  """Body of `/v1/completions`."""

  prompt: _Text | _Ids | list[_Text] | list[_Ids]
  images: list[ImageUrl | str] = Field(
    default_factory=list,
    description='Pictures of a prompt that is one text, one for each '
    '`<img></img>` in it, in order.',
  )
  max_tokens: int = Field(16, ge=0, lt=2**31)
  echo: bool = False
  logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
  best_of: Literal[1] | None = None
  suffix: None = None

  model_config = pydantic.ConfigDict(
    extra='forbid',
    json_schema_extra={
      'examples': [
        {'prompt': 'Once upon a time', 'max_tokens': 16},
        {'prompt': 'Scored', 'echo': True, 'logprobs': 1, 'max_tokens': 0},
      ]
    },
  )


class TokenizeRequest(_Strict):
  """Body of `/tokenize`: a text, or a conversation without pictures."""

  model: str | None = None
  prompt: _Text | None = None
  messages: list[Message] | None = None
  chat_template_kwargs: TemplateOptions = TemplateOptions()
  add_generation_prompt: bool = True
  continue_final_message: bool = False

  model_config = pydantic.ConfigDict(
    extra='forbid', json_schema_extra={'examples': [{'prompt': 'Hello'}]}
  )


class DetokenizeRequest(_Strict):
  """Body of `/detokenize`."""

  model: str | None = None
  tokens: list[_Id] = Field(max_length=2**17, examples=[[9707, 1879]])
