"""Examples: text in pieces with and without loss, and its token ids.

A `Sample` is a trunk that everything sees (the picture) and branches that see
the trunk and themselves (questions about it), as in `batch.Batch.branch_ids`.
Several questions then share one picture's tokens, and each is learned exactly
as if it stood alone.
"""

import dataclasses
import functools
import re

import numpy as np

from qwenvl_jax.errors import DataError
from qwenvl_jax.text import grounding
from qwenvl_jax.text.tokenizer import Tokenizer

END = '<|endoftext|>'

# Characters of a text that may well come again, as prompts do.
_REPEATED = 160

# Anything that may be a special token.
_TAG = re.compile('(<[^<> ]*>)')


@dataclasses.dataclass(frozen=True)
class Piece:
  """Text that is encoded by itself; `loss`: whether it is to be learned."""

  text: str
  loss: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
  """One example, as text.

  Attributes:
    record: id of the record it was made from, for errors.
    trunk: pieces that stand first; each `<img>..</img>` span takes the next of
      `images`.
    branches: alternatives that continue the trunk. A branch begins with a piece
      without loss: the token before it belongs to the trunk, which has no room
      for one target per branch.
    images: pictures in reading order, as `image.load` takes them.
  """

  record: str
  trunk: tuple[Piece, ...]
  branches: tuple[tuple[Piece, ...], ...] = ()
  images: tuple[object, ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt and the answer it asks for: trained on, and scored.

  Attributes:
    task: one of the seven tasks of stage 2, e.g. 'vqa'.
    kind: what exactly is asked, e.g. 'count'.
    language: 'en' or 'zh'.
    prompt: the text after the picture; no loss.
    answer: what follows it, with its leading space if it has one.
    record: id of the record it is about.
    boxes: the boxes of the answer, x1, y1, x2, y2 in thousandths of the side.
    objects: how many objects the scene holds.
    image: whether it is about a picture (pure text is not).
  """

  task: str
  kind: str
  language: str
  prompt: str
  answer: str
  record: str
  boxes: tuple[tuple[int, int, int, int], ...] = ()
  objects: int = 0
  image: bool = True

  @property
  def reference(self) -> str:
    """The answer without the space or line break before it."""
    return self.answer.strip()

  def pieces(self) -> tuple[Piece, ...]:
    """In the format of stages 1 and 2; chats have one of their own."""
    return Piece(self.prompt), Piece(self.answer + END, loss=True)


@dataclasses.dataclass(frozen=True)
class EncodedSample:
  """One example, as token ids. T tokens, trunk first, then the branches.

  Attributes:
    record: id of the record it was made from.
    tokens: [T] int32.
    weights: [T] float32, loss weight of the token itself.
    positions: [T] int32; a branch continues the count of the trunk.
    branch_ids: [T] int32, 0 in the trunk, then 1, 2, ..
    image_starts: index of the first of each image's ids.
    images: the pictures, in the same order.
    image_tokens: length of every image span.
  """

  record: str
  tokens: np.ndarray
  weights: np.ndarray
  positions: np.ndarray
  branch_ids: np.ndarray
  image_starts: tuple[int, ...]
  images: tuple[object, ...]
  image_tokens: int

  def __len__(self) -> int:
    return len(self.tokens)

  @property
  def examples(self) -> int:
    """How many questions, captions or documents it teaches."""
    return int(self.branch_ids.max(initial=0)) or 1


def encode_sample(
  sample: Sample,
  tokenizer: Tokenizer,
  image_tokens: int,
  *,
  length_alpha: float = 0.0,
  max_length: int | None = None,
) -> EncodedSample:
  """Token ids of a sample.

  Args:
    sample: the text.
    tokenizer: its vocabulary.
    image_tokens: ids an image span holds between its tags.
    length_alpha: each branch's weights (and the trunk's) are n**-alpha where n
      is the number of its tokens with loss. 0 weighs tokens equally, 1 weighs
      answers equally, so that boxes do not swamp a 'yes'.
    max_length: branches that would exceed it are left out, from the first one
      that does not fit on; a later, shorter one may still fit.

  Raises:
    DataError: a branch that begins with loss, a text with unclosed tags, or
      not as many image spans as images.
  """
  tokens, weights = _encode_pieces(
    sample.trunk, tokenizer, image_tokens, length_alpha, sample.record
  )
  trunk = len(tokens)
  branch_ids, positions = [0] * trunk, list(range(trunk))
  number = 0
  for pieces in sample.branches:
    more, more_weights = _encode_pieces(
      pieces, tokenizer, image_tokens, length_alpha, sample.record
    )
    if max_length is not None and len(tokens) + len(more) > max_length:
      continue
    if more_weights and more_weights[0]:
      raise DataError(
        f'{sample.record}: branch {pieces} begins with loss; begin it with a '
        'piece of the prompt'
      )
    number += 1
    tokens += more
    weights += more_weights
    branch_ids += [number] * len(more)
    positions += range(trunk, trunk + len(more))
  starts = ()
  if sample.images:
    starts = tuple(_image_starts(tokens, tokenizer))
  if len(starts) != len(sample.images):
    raise DataError(
      f'{sample.record}: {len(starts)} <img> spans for {len(sample.images)} '
      'images; write one span for each image'
    )
  return EncodedSample(
    record=sample.record,
    tokens=np.array(tokens, np.int32),
    weights=np.array(weights, np.float32),
    positions=np.array(positions, np.int32),
    branch_ids=np.array(branch_ids, np.int32),
    image_starts=starts,
    images=sample.images,
    image_tokens=image_tokens,
  )


def plain(sample: Sample) -> Sample:
  """The sample with its first branch written on into the trunk."""
  first = sample.branches[0] if sample.branches else ()
  return dataclasses.replace(sample, trunk=sample.trunk + first, branches=())


def _encode_pieces(pieces, tokenizer, image_tokens, alpha, record):
  tokens, learned = [], []
  for piece in pieces:
    try:
      ids = _encode_text(tokenizer, piece.text, image_tokens)
    except DataError as error:
      raise DataError(f'{record}: {error}') from error
    tokens += ids
    learned += [piece.loss] * len(ids)
  count = sum(learned)
  weight = float(count) ** -alpha if count else 0.0
  return tokens, [weight * flag for flag in learned]


def _encode_text(tokenizer, text, image_tokens) -> tuple[int, ...]:
  # Long texts hardly ever come twice, and would fill the memory.
  if len(text) <= _REPEATED:
    return _encode_short(tokenizer, text, image_tokens)
  return _encode_any(tokenizer, text, image_tokens)


@functools.lru_cache(maxsize=1 << 16)
def _encode_short(tokenizer, text, image_tokens) -> tuple[int, ...]:
  return _encode_any(tokenizer, text, image_tokens)


def _encode_any(tokenizer, text, image_tokens) -> tuple[int, ...]:
  """As `tokenizer.encode`, several times faster on text full of boxes.

  The tokenizer hands all 217 special tokens to each call; here the few that
  occur are looked up.
  """
  grounding.check_tags(text, 'its text')
  if '<img>' in text:
    return tuple(tokenizer.encode(text, image_tokens))
  special = _special(tokenizer)
  ids = []
  for part in _TAG.split(text):
    if part in special:
      ids.append(special[part])
    elif part:
      ids += tokenizer.encode_ordinary(part)
  return tuple(ids)


@functools.lru_cache(maxsize=16)
def _special(tokenizer) -> dict[str, int]:
  return tokenizer.special


def _image_starts(tokens, tokenizer) -> list[int]:
  start = tokenizer.img_start_id
  return [i + 1 for i, token in enumerate(tokens) if token == start]
