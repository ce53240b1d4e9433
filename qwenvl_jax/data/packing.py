"""Rows of fixed shape: several samples, several images, padding.

The arrays of a row are the fields of `qwenvl_jax.batch.Batch` without B.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from qwenvl_jax import image
from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data.examples import EncodedSample
from qwenvl_jax.errors import BadRecordError

# (picture, R, name of the record) -> [R,R,3] uint8, as `image.pixels`.
Decode = Callable[[object, int, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
  """A row and what did not go into it.

  Attributes:
    arrays: `Batch`'s fields, without B.
    truncated: tokens cut off the end.
  """

  arrays: dict[str, np.ndarray]
  truncated: int


def fill(
  samples: Sequence[EncodedSample], length: int, image_slots: int
) -> list[EncodedSample]:
  """The first sample and every later one for which there is still room."""
  kept = list(samples[:1])
  tokens = sum(map(len, kept))
  images = sum(len(x.images) for x in kept)
  for sample in samples[1:]:
    more = len(sample.images)
    if tokens + len(sample) <= length and images + more <= image_slots:
      kept.append(sample)
      tokens += len(sample)
      images += more
  return kept


def cut(sample: EncodedSample, length: int, image_slots: int) -> EncodedSample:
  """The sample, its text cut off at its end if it is longer than a row.

  Raises:
    BadRecordError: an image would be cut, or there are more than slots.
  """
  last = max(sample.image_starts, default=-1)
  if last >= 0 and last + sample.image_tokens >= length:
    raise BadRecordError(
      'too_long',
      f'{sample.record}: an image ends beyond token {length}; shorten the text '
      'before it, or raise sequence_length',
    )
  if len(sample.images) > image_slots:
    raise BadRecordError(
      'too_long',
      f'{sample.record}: {len(sample.images)} images are more than a row has '
      f'slots; raise image_slots ({image_slots})',
    )
  if len(sample) <= length:
    return sample
  return dataclasses.replace(
    sample,
    tokens=sample.tokens[:length],
    weights=sample.weights[:length],
    positions=sample.positions[:length],
    branch_ids=sample.branch_ids[:length],
  )


def choose(
  lengths: Sequence[int], images: Sequence[int], length: int, image_slots: int
) -> list[int]:
  """Which of a pool of samples fill a row best: the first, and the best others.

  Exact: no other choice with the first sample has more tokens. The first is the
  one that waits longest, so none waits for ever; among equals earlier ones are
  preferred.

  >>> choose([5, 4, 3, 6], [0] * 4, 12, 0)
  [0, 1, 2]
  >>> choose([5, 4, 3, 6], [1] * 4, 12, 2)
  [0, 3]

  Args:
    lengths: tokens of each sample; the first fits.
    images: images of each.
    length: tokens that fit.
    image_slots: images that fit.

  Returns:
    Positions in the pool, in order.
  """
  # Bit t of reach[k]: some of the samples so far have t tokens and k images.
  mask = (1 << (length + 1)) - 1
  reach = [0] * (image_slots + 1)
  reach[images[0]] = 1 << lengths[0]
  steps = [reach]
  for size, count in zip(lengths[1:], images[1:]):
    before, reach = reach, reach.copy()
    for k in range(count, image_slots + 1):
      reach[k] |= before[k - count] << size & mask
    steps.append(reach)
  total = max(x.bit_length() for x in reach) - 1
  k = next(k for k, x in enumerate(reach) if x >> total & 1)
  chosen = []
  for position in range(len(lengths) - 1, 0, -1):
    if not steps[position - 1][k] >> total & 1:
      chosen.append(position)
      total -= lengths[position]
      k -= images[position]
  return [0, *reversed(chosen)]


def make_row(
  samples: Sequence[EncodedSample],
  length: int,
  image_slots: int,
  image_size: int,
  pad_id: int = 0,
  decode: Decode = image.pixels,
) -> Row:
  """Lays samples one after the other, each a segment of its own.

  Args:
    samples: at most what fits; the last one's text may be longer than the row
      and is cut at the end.
    length: T, tokens of the row.
    image_slots: I, images of the row.
    image_size: R, side of the square that images are squashed to.
    pad_id: fills the rest of `tokens`.
    decode: how pictures are opened and resized.

  Returns:
    The row: int32 [T] tokens, targets, positions, segment_ids, branch_ids,
    float32 [T] loss_weights, uint8 [I,R,R,3] pixels, int32 [I] image_starts.

  Raises:
    BadRecordError: an image that would be cut or has no slot, or one that
      cannot be read; the error names the record.
  """
  tokens = np.full(length, pad_id, np.int32)
  targets = np.zeros(length, np.int32)
  loss_weights = np.zeros(length, np.float32)
  positions = np.zeros(length, np.int32)
  segment_ids = np.zeros(length, np.int32)
  branch_ids = np.zeros(length, np.int32)
  pixels = np.zeros((image_slots, image_size, image_size, 3), np.uint8)
  image_starts = np.full(image_slots, NO_IMAGE, np.int32)
  start, slot, truncated = 0, 0, 0
  for segment, sample in enumerate(samples, start=1):
    size = min(len(sample), length - start)
    truncated += len(sample) - size
    for image_start, source in zip(sample.image_starts, sample.images):
      # The closing tag belongs to the span.
      if image_start + sample.image_tokens >= size:
        raise BadRecordError(
          'too_long',
          f'{sample.record}: token {size} is the last that fits, which cuts '
          f'its image at tokens {image_start - 1} to '
          f'{image_start + sample.image_tokens}; raise sequence_length '
          f'({length}), or shorten the text before the image',
        )
      if slot == image_slots:
        raise BadRecordError(
          'too_long',
          f'{sample.record}: more images than the row has slots; raise '
          f'image_slots ({image_slots})',
        )
      pixels[slot] = decode(source, image_size, sample.record)
      image_starts[slot] = start + image_start
      slot += 1
    end = start + size
    tokens[start:end] = sample.tokens[:size]
    positions[start:end] = sample.positions[:size]
    branch_ids[start:end] = sample.branch_ids[:size]
    segment_ids[start:end] = segment
    # A token is the target of the one before it. Where a branch begins that
    # one belongs to another branch, but there the weight is 0.
    if size > 1:
      targets[start : end - 1] = sample.tokens[1:size]
      loss_weights[start : end - 1] = sample.weights[1:size]
    start = end
  return Row(
    arrays={
      'tokens': tokens,
      'targets': targets,
      'loss_weights': loss_weights,
      'positions': positions,
      'segment_ids': segment_ids,
      'branch_ids': branch_ids,
      'pixels': pixels,
      'image_starts': image_starts,
    },
    truncated=truncated,
  )
