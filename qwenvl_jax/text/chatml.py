r"""Chat turns as token ids: ChatML contexts, SFT examples, the list format.

A turn is `<|im_start|>ROLE\nCONTENT<|im_end|>`, turns are joined by newlines,
and a context ends where the assistant's content begins. Pictures are numbered
through a conversation: `Picture N: <img>PATH</img>\n`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from qwenvl_jax.errors import DataError
from qwenvl_jax.text import grounding
from qwenvl_jax.text.special_tokens import PLACE_TOKENS, VISUAL_TOKENS
from qwenvl_jax.text.tokenizer import (
  IMAGE_TOKENS,
  Tokenizer,
  image_paths,
  normalize,
)

DEFAULT_SYSTEM = 'You are a helpful assistant.'
MAX_WINDOW_SIZE = 6144
NO_LOSS = -100
# What contexts and examples encode on their own around contents; a vocabulary
# made with `Tokenizer.subset` for chats should cover these too.
SCAFFOLD = ('system', 'user', 'assistant', '\n', DEFAULT_SYSTEM)

_OPENING = re.compile('<(img|ref|box|quad)>')
_LIST_KEYS = {'img': 'image'}


@dataclasses.dataclass(frozen=True)
class TextSpan:
  """Text that is encoded by itself; `loss`: whether it is to be learned."""

  text: str
  loss: bool = False


@dataclasses.dataclass(frozen=True)
class Context:
  """What the model is given before it answers.

  Attributes:
    tokens: token ids.
    text: the same as text.
    image_paths: paths of the image spans, in reading order.
    image_starts: index of the first feature token of each of them.
    dropped_turns: oldest turns that the window left out.
    dropped_images: number of image spans in those turns: of the conversation's
      images, the first `dropped_images` are not in the context.
  """

  tokens: list[int]
  text: str
  image_paths: list[str]
  image_starts: list[int]
  dropped_turns: int
  dropped_images: int


def chat_context(
  tokenizer: Tokenizer,
  query: str,
  history: Sequence[tuple[str, str | None]] = (),
  system: str = DEFAULT_SYSTEM,
  max_window_size: int = MAX_WINDOW_SIZE,
  image_tokens: int = IMAGE_TOKENS,
) -> Context:
  """The context for the next answer, with as much history as the window takes.

  Walks back from the newest turn and keeps a turn while the system turn, what
  is kept and the turn are shorter than the window together; the query is not
  counted. Of the special tokens, contents may hold those of images and boxes; a
  typed `<|im_end|>` stays text.

  Args:
    tokenizer: the vocabulary.
    query: what the user says now.
    history: (query, answer) pairs, oldest first. Answers are a model's own
      words: an `<img>` in them that is never closed is taken as text.
    system: the system turn's content.
    max_window_size: tokens of system turn and history, one more than allowed.
    image_tokens: ids in an image span.

  Raises:
    DataError: an unclosed `<img>` in the query or an earlier one.
  """
  newline = tokenizer.encode_ordinary('\n')

  def turn(role: str, content: str) -> tuple[str, list[int]]:
    allowed = VISUAL_TOKENS
    if role == 'assistant' and not _images_closed(content):
      allowed = [t for t in VISUAL_TOKENS if 'img' not in t]
    ids = [
      tokenizer.im_start_id,
      *tokenizer.encode_ordinary(role),
      *newline,
      *tokenizer.encode(content, image_tokens, allowed),
      tokenizer.im_end_id,
    ]
    return f'<|im_start|>{role}\n{content}<|im_end|>', ids

  text, tokens = turn('system', system)
  kept_text, kept = '', []
  dropped = len(history)
  for question, answer in reversed(history):
    said, ids = turn('user', question)
    said, ids = f'\n{said}\n', [*newline, *ids, *newline]
    if answer is not None:
      reply, reply_ids = turn('assistant', answer)
      said, ids = said + reply, ids + reply_ids
    if len(tokens) + len(kept) + len(ids) >= max_window_size:
      break
    kept_text, kept = said + kept_text, ids + kept
    dropped -= 1
  question, ids = turn('user', query)
  tokens += [*kept, *newline, *ids, *newline, tokenizer.im_start_id]
  tokens += [*tokenizer.encode_ordinary('assistant'), *newline]
  turns = [*history[dropped:], (query, None)]
  return Context(
    tokens=tokens,
    text=f'{text}{kept_text}\n{question}\n<|im_start|>assistant\n',
    image_paths=_turn_images([(system, None)]) + _turn_images(turns),
    image_starts=tokenizer.image_starts(tokens, image_tokens, 'the chat'),
    dropped_turns=dropped,
    dropped_images=len(_turn_images(history[:dropped])),
  )


def encode_parts(
  tokenizer: Tokenizer,
  parts: Sequence[str | None],
  image_tokens: int = IMAGE_TOKENS,
) -> list[int]:
  """Encodes people's text with pictures between; no text becomes a control id.

  Of the special tokens, `<ref>`, `<box>` and `<quad>` are read in texts. What
  stands in the span of a picture is replaced by its features.

  Args:
    tokenizer: the vocabulary.
    parts: texts, and None for each picture.
    image_tokens: ids in an image span.
  """
  ids, text = [], ''
  for part in (*parts, None):
    if part is not None:
      text += part
      continue
    ids += tokenizer.encode(text, allowed_special=PLACE_TOKENS)
    text = ''
    ids.append(tokenizer.img_start_id)
    ids += [tokenizer.img_pad_id] * image_tokens
    ids.append(tokenizer.img_end_id)
  return ids[: -image_tokens - 2]


def open_turn(role: str) -> tuple[TextSpan, ...]:
  """Returns what stands before a turn's content; the role is not learned."""
  return TextSpan('<|im_start|>', loss=True), TextSpan(role), TextSpan('\n')


# What stands after a turn's content.
CLOSE_TURN = (TextSpan('<|im_end|>', loss=True), TextSpan('\n', loss=True))


def turn_spans(role: str, content: str) -> tuple[TextSpan, ...]:
  """Returns a turn as it is trained on: of contents, the assistant's only."""
  learned = TextSpan(content, loss=role == 'assistant')
  return *open_turn(role), learned, *CLOSE_TURN


def conversation_spans(
  turns: Sequence[tuple[str, str]], system: str = DEFAULT_SYSTEM
) -> tuple[TextSpan, ...]:
  """Returns a conversation as it is trained on, () if no turn is left.

  Trained on are `<|im_start|>`, `<|im_end|>` and the newline after it of every
  turn, and the assistant's words, but never the role and its newline. A leading
  turn of the assistant is dropped, as the release does.

  Args:
    turns: (role, content) each; a first turn of the role 'system' takes the
      place of `system`.
    system: the system turn's content.
  """
  if turns and turns[0][0] == 'system':
    system, turns = turns[0][1], turns[1:]
  if turns and turns[0][0] != 'user':
    turns = turns[1:]
  if not turns:
    return ()
  both = (('system', system), *turns)
  return tuple(span for turn in both for span in turn_spans(*turn))


def sft_example(
  tokenizer: Tokenizer,
  turns: Sequence[Mapping[str, str]],
  max_len: int | None = None,
  system: str = DEFAULT_SYSTEM,
  image_tokens: int = IMAGE_TOKENS,
  record: str = 'the conversation',
) -> tuple[list[int], list[int]]:
  """Ids and labels as the release's fine-tuning makes them.

  They are those of `conversation_spans`, of which all special tokens are
  parsed.

  Args:
    tokenizer: the vocabulary.
    turns: `{'from': 'user' or 'assistant', 'value': text}` each.
    max_len: length to pad (`<|endoftext|>`, no loss) or cut to; None for the
      conversation's own.
    system: the system turn's content.
    image_tokens: ids in an image span.
    record: what an error names.

  Returns:
    `input_ids`, and `labels` aligned with them: the id itself or -100.

  Raises:
    DataError: a turn that is not such a mapping, tags that do not pair up, no
      turn at all, or cutting to `max_len` would cut an image.
  """
  turns = [_checked(turn, i, record) for i, turn in enumerate(turns, start=1)]
  spans = conversation_spans(turns, system)
  if not spans:
    raise DataError(
      f"{record}: no turn left; it needs a turn with 'from': 'user'"
    )
  ids, labels = [], []
  for span in spans:
    tokens = tokenizer.encode(span.text, image_tokens)
    ids += tokens
    labels += tokens if span.loss else [NO_LOSS] * len(tokens)
  if max_len is not None:
    ids, labels = ids[:max_len], labels[:max_len]
    tokenizer.image_starts(ids, image_tokens, f'{record}, cut to {max_len}')
    ids += [tokenizer.eod_id] * (max_len - len(ids))
    labels += [NO_LOSS] * (max_len - len(labels))
  return ids, labels


def from_list_format(items: Sequence[Mapping], first_picture: int = 1) -> str:
  r"""A turn's text from a list of its parts.

  >>> from_list_format([{'image': 'a.jpg'}, {'text': 'What is this?'}])
  'Picture 1: <img>a.jpg</img>\nWhat is this?'

  Args:
    items: `{'image': path}`, `{'text': text}`, or `{'box': boxes}` or
      `{'quad': quads}` with an optional `'ref'`, written before them; boxes are
      lists of 4 numbers in [0,1000), quads of 8.
    first_picture: number of the first picture, where earlier turns have some.

  Raises:
    DataError: an item of another kind.
  """
  parts = []
  picture = first_picture
  for number, item in enumerate(items, start=1):
    if 'image' in item:
      parts.append(f'Picture {picture}: <img>{item["image"]}</img>\n')
      picture += 1
    elif 'text' in item:
      parts.append(item['text'])
    elif 'box' in item or 'quad' in item:
      if 'ref' in item:
        parts.append(f'<ref>{item["ref"]}</ref>')
      parts += map(grounding.format_box, item.get('box', ()))
      parts += map(grounding.format_quad, item.get('quad', ()))
    else:
      raise DataError(
        f'item {number} of the list has the keys {sorted(item)}; it needs '
        "'image', 'text', 'box' or 'quad'"
      )
  return ''.join(parts)


def to_list_format(text: str) -> list[dict[str, str]]:
  """The parts of a text, as written: text, image, ref, box, quad.

  A tag that is never closed is part of the text around it.

  >>> to_list_format('a <ref>dog</ref><box>(1,2),(3,4)</box>')
  [{'text': 'a '}, {'ref': 'dog'}, {'box': '(1,2),(3,4)'}]
  """
  text = normalize(text)
  items, at, unclosed = [], 0, set()
  for match in _OPENING.finditer(text):
    tag = match[1]
    # Each tag is looked for once beyond its last closing one.
    if match.start() < at or tag in unclosed:
      continue
    end = text.find(f'</{tag}>', match.end())
    if end < 0:
      unclosed.add(tag)
      continue
    if match.start() > at:
      items.append({'text': text[at : match.start()]})
    items.append({_LIST_KEYS.get(tag, tag): text[match.end() : end]})
    at = end + len(f'</{tag}>')
  if at < len(text):
    items.append({'text': text[at:]})
  return items


def to_boxes(text: str) -> list[dict]:
  """The boxes of a text as the release lists them, for its users.

  Each is `{'box': (x1, y1, x2, y2)}`, with `'ref'` only if it directly follows
  a phrase. Quads are left out, and so are boxes without four numbers.
  `grounding.parse` reads more.
  """
  boxes = []
  before = {}
  for item in to_list_format(text):
    box = grounding.first_box(item.get('box', ''))
    if box is not None:
      boxes.append({'box': box})
      if 'ref' in before:
        boxes[-1]['ref'] = before['ref'].strip()
    before = item
  return boxes


def _checked(turn, number: int, record: str) -> tuple[str, str]:
  name = f'{record}, turn {number}'
  try:
    role, content = turn['from'], turn['value']
  except (TypeError, KeyError, IndexError):
    raise DataError(
      f"{name} has no 'from' and 'value': {str(turn)[:60]}"
    ) from None
  if role not in ('user', 'assistant'):
    raise DataError(
      f"{name}: 'from' is {role!r}; it must be 'user' or 'assistant'"
    )
  if not isinstance(content, str):
    raise DataError(f"{name}: 'value' must be text, not {content!r:.60}")
  grounding.check_tags(content, name)
  return role, content


def _images_closed(text: str) -> bool:
  spans = text.split('<img>')[1:]
  return all('</img>' in span for span in spans)


def _turn_images(turns) -> list[str]:
  return [
    path
    for question, answer in turns
    for path in image_paths(question)
    + (image_paths(answer) if answer and _images_closed(answer) else [])
  ]
