"""Prompts of many lengths to one left-padded batch of few shapes.

Everything compiled depends on shapes, so lengths, rows and image slots are
rounded up to `bucket` sizes: a handful of programs serves every request.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.batch import NO_IMAGE, Batch, text_batch
from qwenvl_jax.errors import DataError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.vision import CLIP_MEAN, CLIP_STD

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
  return np.stack(images)


def pad_prompts(
  config: QwenVLConfig,
  prompts: Sequence[Sequence[int]],
  images: Sequence | None,
  *,
  rows: int,
  length: int,
  names: Sequence[str] | None = None,
) -> Batch:
  """Lays prompts into rows, the padding on the left.

  Args:
    config: of the model.
    prompts: token ids.
    images: per prompt [I,R,R,3] or None, in reading order; None for no images
      at all.
    rows: rows of the batch; those past the prompts are padding.
    length: tokens of a row.
    names: what an error calls each prompt; 'row 0', 'row 1', ... by default.

  Returns:
    A NumPy batch; image slots as many as the prompt with most images has,
    rounded up.

  Raises:
    DataError: an empty prompt, an id the model does not have, or images that
      do not fit the spans.
  """
  names = names or [f'row {i}' for i in range(len(prompts))]
  images = images_per_prompt(prompts, images)
  tokens = np.zeros((rows, length), np.int32)
  mask = np.zeros((rows, length), bool)
  placed = []
  for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
    ids = check_ids(prompt, config, name)
    starts = image_starts(ids, config, name)
    pad = length - len(ids)
    tokens[row, pad:], mask[row, pad:] = ids, True
    placed.append(
      (
        np.asarray(starts, np.int32) + pad,
        match_images(starts, images[row], name),
      )
    )
  batch = text_batch(tokens, mask)
  slots = bucket(max((len(starts) for starts, _ in placed), default=0))
  first = next((i for i, (s, _) in enumerate(placed) if len(s)), None)
  if first is None:
    return batch
  shape = placed[first][1].shape[1:]
  # One float picture makes the whole batch float.
  floats = any(p.dtype != np.uint8 for s, p in placed if len(s))
  pixels = np.zeros((rows, slots, *shape), np.float32 if floats else np.uint8)
  where = np.full((rows, slots), NO_IMAGE, np.int32)
  for row, (starts, values) in enumerate(placed):
    if not len(starts):
      continue
    if values.shape[1:] != shape:
      raise DataError(
        f'{names[row]}: images of {values.shape[1:]}, but {names[first]} has '
        f'{shape}; preprocess all images to one resolution'
      )
    if floats and values.dtype == np.uint8:
      values = (values.astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
    pixels[row, : len(starts)] = values
    where[row, : len(starts)] = starts
  return dataclasses.replace(batch, pixels=pixels, image_starts=where)


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
  wrong = ids[(ids < 0) | (ids >= config.decoder.vocab_size)]
  if wrong.size:
    raise DataError(
      f'{name}: id {wrong[0]} is not in the vocabulary of '
      f'{config.decoder.vocab_size}; does the tokenizer belong to this '
      'checkpoint?'
    )
  return ids.astype(np.int32)


def check_room(
  prompt: Sequence[int], max_new_tokens: int, config: QwenVLConfig, name: str
) -> None:
  """DataError if prompt and answer pass `max_position_embeddings`."""
  limit = config.decoder.max_position_embeddings
  if len(prompt) + max_new_tokens > limit:
    raise DataError(
      f'{name}: {len(prompt)} prompt tokens and max_new_tokens='
      f'{max_new_tokens} are more than the {limit} positions of the model '
      '(max_position_embeddings); shorten the prompt or ask for fewer tokens'
    )
