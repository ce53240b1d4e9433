"""Checks of prompts and their images, and the lengths that are compiled for.

Everything compiled depends on shapes, so lengths are rounded up to `bucket`
sizes: a handful of programs serves every request.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.model.config import QwenVLConfig

MIN_LENGTH = 32


def bucket(size: int, smallest: int = 1) -> int:
  """The least of smallest * (1, 1.5, 2, 3, 4, 6, 8, ...) that holds `size`.

  >>> [bucket(n) for n in (1, 3, 5, 7, 9)], bucket(70, 32)
  ([1, 3, 6, 8, 12], 96)
  """
  power = smallest
  while power < size:
    if power % 2 == 0 and power + power // 2 >= size:
      return power + power // 2
    power *= 2
  return power


def image_starts(
  ids: Sequence[int], config: QwenVLConfig, record: str
) -> list[int]:
  """Where each image's features go: the index after each `<img>`.

  Args:
    ids: [T] token ids.
    config: names `<img>` and the number of ids in a span.
    record: what an error names.

  Returns:
    Indices in reading order.

  Raises:
    DataError: a span that is cut off or of another length.
  """
  ids = np.asarray(ids).reshape(-1)
  queries = config.adapter.queries
  starts = []
  # What stands inside a span is arbitrary and never opens another one.
  inside_until = -1
  for index in np.flatnonzero(ids == config.image_start_id).tolist():
    if index < inside_until:
      continue
    inside_until = index + 1 + queries
    if (
      inside_until >= len(ids) or ids[inside_until] != config.image_start_id + 1
    ):
      raise DataError(
        f'{record}: the span of image {len(starts) + 1} begins at token '
        f'{index} of {len(ids)} and is cut off or not {queries} ids long; '
        'shorten the text before it, allow more tokens, or encode with '
        f'image_tokens={queries}'
      )
    starts.append(index + 1)
  return starts


def match_images(starts: Sequence[int], images, record: str) -> np.ndarray:
  """Checks one prompt's images against its spans.

  Args:
    starts: of `image_starts`.
    images: [I,R,R,3] pixels (an array, or a list of [R,R,3]), or None.
    record: what an error names.

  Returns:
    [I,R,R,3], uint8 or normalized float.

  Raises:
    DataError: another number of images, or images that do not stack.
  """
  images = [] if images is None else list(images)
  if len(images) != len(starts):
    raise DataError(
      f'{record}: {len(starts)} <img> spans in the tokens, but '
      f'{len(images)} images given; every span needs one image'
    )
  images = [np.asarray(image) for image in images]
  if not images:
    return np.zeros((0, 1, 1, 3), np.uint8)
  shape = images[0].shape
  for number, image in enumerate(images, start=1):
    if image.ndim != 3 or image.shape[2] != 3 or image.shape != shape:
      raise DataError(
        f'{record}: image {number} has shape {image.shape}, expected '
        f'[R,R,3]{f" like the first, {shape}" if number > 1 else ""}; '
        'preprocess all images to one resolution'
      )
    is_float = jnp.issubdtype(image.dtype, jnp.floating)
    if image.dtype != np.uint8 and not is_float:
      raise DataError(
        f'{record}: image {number} is {image.dtype}, neither uint8 nor '
        'normalized float; give what `preprocess` or `image.pixels` makes'
      )
  return np.stack(images)


def images_per_prompt(prompts: Sequence, images: Sequence | None) -> list:
  """One entry a prompt, whatever was given; DataError if the numbers differ."""
  images = [None] * len(prompts) if images is None else list(images)
  if len(images) != len(prompts):
    raise DataError(
      f'{len(prompts)} prompts, but images for {len(images)}; give one entry '
      'a prompt, None for a prompt without images'
    )
  return images


def check_ids(
  prompt: Sequence[int], config: QwenVLConfig, name: str
) -> np.ndarray:
  """[T] int32 of a prompt; DataError if it is empty or has unknown ids."""
  ids = np.asarray(prompt)
  if ids.ndim != 1 or ids.size == 0:
    raise DataError(
      f'{name}: the prompt has shape {ids.shape}; expected at least one id'
    )
  if ids.dtype.kind not in 'iu':
    raise DataError(
      f'{name}: the prompt is {ids.dtype}; expected ids, which are integers'
    )
  wrong = ids[(ids < 0) | (ids >= config.decoder.vocab_size)]
  if wrong.size:
    raise DataError(
      f'{name}: id {wrong[0]} is not in the vocabulary of '
      f'{config.decoder.vocab_size}; does the tokenizer belong to this '
      'checkpoint?'
    )
  return ids.astype(np.int32)


def check_count(name: str, value: int) -> None:
  """ConfigError if a number of things is below one."""
  if value < 1:
    raise ConfigError(f'{name}={value}: must be at least 1')
