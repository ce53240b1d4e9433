"""Rows of fixed shape: several samples, several images, padding.

The arrays of a row are the fields of `qwenvl_jax.batch.Batch` without B.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data import image
from qwenvl_jax.data.examples import EncodedSample
from qwenvl_jax.errors import DataError


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


def make_row(
  samples: Sequence[EncodedSample],
  length: int,
  image_slots: int,
  image_size: int,
  pad_id: int = 0,
) -> Row:
  """Lays samples one after the other, each a segment of its own.

  Args:
    samples: at most what fits; the last one's text may be longer than the row
      and is cut at the end.
    length: T, tokens of the row.
    image_slots: I, images of the row.
    image_size: R, side of the square that images are squashed to.
    pad_id: fills the rest of `tokens`.

  Returns:
    The row: int32 [T] tokens, targets, positions, segment_ids, branch_ids,
    float32 [T] loss_weights, uint8 [I,R,R,3] pixels, int32 [I] image_starts.

  Raises:
    DataError: an image that would be cut or has no slot, or one that cannot be
      read; the error names the record.
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
        raise DataError(
          f'{sample.record}: token {size} is the last that fits, which cuts '
          f'its image at tokens {image_start - 1} to '
          f'{image_start + sample.image_tokens}; raise sequence_length '
          f'({length}), or shorten the text before the image'
        )
      if slot == image_slots:
        raise DataError(
          f'{sample.record}: more images than the row has slots; raise '
          f'image_slots ({image_slots})'
        )
      pixels[slot] = image.pixels(source, image_size, sample.record)
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
