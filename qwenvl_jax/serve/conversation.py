"""Messages of a request as the model reads them.

Turns are ChatML, pictures are numbered through the conversation (`Picture N:`),
as the release does both. What users write never becomes a control id: of the
special tokens, only `<ref>`, `<box>` and `<quad>` are read in their text, and
the spans of pictures are made here.
"""

import dataclasses
from collections.abc import Sequence

from qwenvl_jax.serve.limits import ApiError, Limits
from qwenvl_jax.serve.pictures import check_count
from qwenvl_jax.serve.schemas import Message, TextPart
from qwenvl_jax.text import chatml, grounding
from qwenvl_jax.text.special_tokens import PLACE_TOKENS
from qwenvl_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What the model is given.

  Attributes:
    tokens: ids.
    urls: of the pictures, one a span, in reading order.
  """

  tokens: list[int]
  urls: list[str]


def check_messages(
  messages: Sequence[Message], limits: Limits, most_chars: int
) -> None:
  """ApiError if a conversation has more in it than it may.

  Looked at before anything is made of it, for each picture stands for hundreds
  of ids.
  """
  if len(messages) > limits.messages:
    raise ApiError(
      f'{len(messages)} messages are more than {limits.messages}', 'messages'
    )
  chars = pictures = 0
  for message in messages:
    content = message.content or ''
    if isinstance(content, str):
      chars += len(content)
      continue
    for part in content:
      if isinstance(part, TextPart):
        chars += len(part.text)
      else:
        pictures += 1
  check_count(pictures, limits)
  check_chars(chars, most_chars, 'messages')


def check_chars(count: int, most: int, field: str) -> None:
  """ApiError if texts are longer than any that fits the model's context."""
  if count > most:
    raise ApiError(
      f'{count:,} characters are more than the {most:,} that could fit this '
      "model's context",
      field,
      code='context_length_exceeded',
    )


def build_prompt(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  image_tokens: int,
  continue_final: bool = False,
  generation_prompt: bool = True,
  numbered: bool = True,
) -> Prompt:
  """Makes the context for the next answer.

  Args:
    tokenizer: the vocabulary.
    messages: of a request.
    image_tokens: ids in the span of a picture.
    continue_final: whether the last message is the beginning of the answer.
    generation_prompt: whether the context ends where an answer begins.
    numbered: whether pictures are, each on a line of its own.

  Raises:
    ApiError: messages in an order or of a kind that the model does not know.
  """
  if continue_final and messages[-1].role != 'assistant':
    raise ApiError(
      "continue_final_message needs a last message of role 'assistant'",
      'continue_final_message',
    )
  newline = tokenizer.encode_ordinary('\n')
  prompt = Prompt([], [])
  turns = [*messages]
  if turns[0].role not in ('system', 'developer'):
    turns.insert(0, Message(role='system', content=chatml.DEFAULT_SYSTEM))
  for number, message in enumerate(turns):
    system = message.role in ('system', 'developer')
    if system and number:
      raise ApiError(
        'a system message must be the first one', f'messages.{number}.role'
      )
    if prompt.tokens:
      prompt.tokens.extend(newline)
    role = 'system' if system else message.role
    prompt.tokens.append(tokenizer.im_start_id)
    prompt.tokens.extend([*tokenizer.encode_ordinary(role), *newline])
    _add_content(prompt, tokenizer, message, image_tokens, numbered)
    prompt.tokens.append(tokenizer.im_end_id)
  if continue_final:
    prompt.tokens.pop()
  elif generation_prompt:
    prompt.tokens.extend([*newline, tokenizer.im_start_id])
    prompt.tokens.extend([*tokenizer.encode_ordinary('assistant'), *newline])
  return prompt


def _add_content(prompt, tokenizer, message, image_tokens, numbered) -> None:
  content = message.content or ''
  if isinstance(content, str):
    content = [TextPart(type='text', text=content)]
  parts = []
  for part in content:
    if isinstance(part, TextPart):
      parts.append(part.text)
      continue
    if message.role != 'user':
      raise ApiError(
        f"pictures belong to messages of role 'user', not {message.role!r}",
        'messages',
      )
    prompt.urls.append(part.url)
    number = f'Picture {len(prompt.urls)}: '
    parts += [number, None, '\n'] if numbered else [None]
  prompt.tokens.extend(chatml.encode_parts(tokenizer, parts, image_tokens))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
  """Ids of what somebody wrote, without control ids."""
  return tokenizer.encode(text, allowed_special=PLACE_TOKENS)


def boxes_in_pixels(text: str, sizes: Sequence[tuple[int, int]]) -> list[dict]:
  """The places in an answer, in pixels of the last picture shown.

  That is the picture that the release draws on.

  Args:
    text: of the answer.
    sizes: (width, height) of all pictures.

  Returns:
    Objects with `ref`, the phrase ('' for none), `picture`, its number from 1,
    and `box` [x1, y1, x2, y2] or `quad` [x1, y1, .., y4].
  """
  if not sizes:
    return []
  found = []
  for place in grounding.parse(text).places:
    about = {'ref': place.ref, 'picture': len(sizes)}
    for name in ('box', 'quad'):
      for points in getattr(place, f'{name}es' if name == 'box' else 'quads'):
        scaled = [round(x, 1) for x in grounding.to_pixels(points, sizes[-1])]
        found.append(about | {name: scaled})
  return found
