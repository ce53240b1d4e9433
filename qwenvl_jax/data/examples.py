"""Samples: text with and without loss about pictures, and its token ids.

A `Sample` is a prefix that everything sees (the picture) and continuations that
see the prefix and themselves (questions about it): `batch.Batch.branch_ids` 0
and above. Several questions then share one picture's tokens, and each is
learned exactly as if it stood alone.
"""

import dataclasses
import functools

import numpy as np

from qwenvl_jax.errors import BadRecordError, DataError
from qwenvl_jax.text import grounding
from qwenvl_jax.text.chatml import TextSpan
from qwenvl_jax.text.tokenizer import Tokenizer

END = '<|endoftext|>'

# Characters of a text that may well come again, as prompts do.
_REPEATED = 160


@dataclasses.dataclass(frozen=True)
class Sample:
  """One example, as text.

  Attributes:
    record: id of the record it was made from, for errors.
    prefix: what stands first; each `<img>..</img>` span takes the next of
      `images`.
    continuations: alternatives that follow the prefix. Each begins with text
      without loss: the token before it belongs to the prefix, which has no room
      for one target per continuation.
    images: pictures in reading order, as `image.load` takes them.
    divisible: whether it may end before an image that does not fit into a row,
      as a document may; else it is left out then.
  """

  record: str
  prefix: tuple[TextSpan, ...]
  continuations: tuple[tuple[TextSpan, ...], ...] = ()
  images: tuple[object, ...] = ()
  divisible: bool = False


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

  def spans(self) -> tuple[TextSpan, ...]:
    """In the format of stages 1 and 2; chats have one of their own."""
    return TextSpan(self.prompt), TextSpan(self.answer + END, loss=True)


@dataclasses.dataclass(frozen=True)
class EncodedSample:
  """One sample, as token ids. T tokens, prefix first, then continuations.

  Attributes:
    record: id of the record it was made from.
    tokens: [T] int32.
    weights: [T] float32, loss weight of the token itself.
    positions: [T] int32; a continuation counts on from the prefix.
    branch_ids: [T] int32, 0 in the prefix, then 1, 2, ..
    image_starts: index of the first of each image's ids.
    images: the pictures, in the same order.
    image_tokens: length of every image span.
    divisible: as `Sample.divisible`.
  """

  record: str
  tokens: np.ndarray
  weights: np.ndarray
  positions: np.ndarray
  branch_ids: np.ndarray
  image_starts: tuple[int, ...]
  images: tuple[object, ...]
  image_tokens: int
  divisible: bool = False

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
    length_alpha: the weights of each continuation (and the prefix) are
      n**-alpha where n is the number of its tokens with loss. 0 weighs tokens
      equally, 1 weighs answers equally, so that boxes do not swamp a 'yes'.
    max_length: continuations that would exceed it are left out; a later,
      shorter one may still fit.

  Raises:
    BadRecordError: tags that do not pair up, or not as many image spans as
      images.
    DataError: a continuation that begins with loss.
  """
  encode = functools.partial(
    _encode_spans, tokenizer, image_tokens, length_alpha, sample.record
  )
  tokens, weights = encode(sample.prefix)
  prefix = len(tokens)
  branch_ids, positions = [0] * prefix, list(range(prefix))
  number = 0
  for spans in sample.continuations:
    more, more_weights = encode(spans)
    if max_length is not None and len(tokens) + len(more) > max_length:
      continue
    if more_weights and more_weights[0]:
      raise DataError(
        f'{sample.record}: {spans} begins with loss; begin it with text of the '
        'prompt'
      )
    number += 1
    tokens += more
    weights += more_weights
    branch_ids += [number] * len(more)
    positions += range(prefix, prefix + len(more))
  ids = np.array(tokens, np.int32)
  starts = np.flatnonzero(ids == tokenizer.img_start_id) + 1
  if len(starts) != len(sample.images):
    raise BadRecordError(
      'image_mismatch',
      f'{sample.record}: {len(starts)} <img> spans for {len(sample.images)} '
      'images; write one span for each image',
    )
  return EncodedSample(
    record=sample.record,
    tokens=ids,
    weights=np.array(weights, np.float32),
    positions=np.array(positions, np.int32),
    branch_ids=np.array(branch_ids, np.int32),
    image_starts=tuple(starts.tolist()),
    images=sample.images,
    image_tokens=image_tokens,
    divisible=sample.divisible,
  )


def plain(sample: Sample) -> Sample:
  """Returns the sample with its first continuation written into the prefix."""
  first = sample.continuations[0] if sample.continuations else ()
  return dataclasses.replace(
    sample, prefix=sample.prefix + first, continuations=()
  )


def _encode_spans(tokenizer, image_tokens, alpha, record, spans):
  tokens, learned = [], []
  for span in spans:
    try:
      ids = _encode_text(tokenizer, span.text, image_tokens)
    except DataError as error:
      raise BadRecordError('unpaired_tag', f'{record}: {error}') from error
    tokens += ids
    learned += [span.loss] * len(ids)
  count = sum(learned)
  weight = float(count) ** -alpha if count else 0.0
  return tokens, [weight * flag for flag in learned]


def _encode_text(tokenizer, text, image_tokens) -> tuple[int, ...]:
  # Long texts hardly ever come twice, and would fill the memory.
  if len(text) <= _REPEATED:
    return _encode_short(tokenizer, text, image_tokens)
  return _encode_any(tokenizer, text, image_tokens)


def _encode_any(tokenizer, text, image_tokens) -> tuple[int, ...]:
  grounding.check_tags(text, 'its text')
  return tuple(tokenizer.encode(text, image_tokens))


_encode_short = functools.lru_cache(maxsize=1 << 16)(_encode_any)
