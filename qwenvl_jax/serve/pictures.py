"""Pictures of a request: fetched, checked by their header, decoded, resized."""

import asyncio
import concurrent.futures
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from qwenvl_jax import image as pictures_lib
from qwenvl_jax.serve.fetch import fetch
from qwenvl_jax.serve.limits import FORMATS, ApiError, Limits

# Requests whose pictures are opened at a time: a large one takes 1 GB.
_POOL = concurrent.futures.ThreadPoolExecutor(8, 'pictures')
# Scans of a JPEG file: decoders go through the whole picture for each, and a
# few bytes are enough for one. Encoders write about ten.
_MAX_SCANS = 200
_SCAN = b'\xff\xda'


class Picture(NamedTuple):
  """What is kept of a picture.

  Attributes:
    pixels: [R,R,3] uint8.
    size: (width, height) of what was sent, turned as EXIF says.
  """

  pixels: np.ndarray
  size: tuple[int, int]


async def read_pictures(
  urls: Sequence[str], limits: Limits, side: int
) -> list[Picture]:
  """`open_pictures` in one of a few threads of their own."""
  if not urls:
    return []
  loop = asyncio.get_running_loop()
  return await loop.run_in_executor(_POOL, open_pictures, urls, limits, side)


def open_pictures(
  urls: Sequence[str], limits: Limits, side: int
) -> list[Picture]:
  """Opens all pictures of a request as RGB, one after the other.

  Raises:
    ApiError: too many, too large, or not a picture of `FORMATS`.
  """
  check_count(len(urls), limits)
  found, pixels = [], 0
  for number, url in enumerate(urls, start=1):
    name = f'picture {number}'
    data = fetch(url, limits, name)
    pixels += _size(data, name)
    if pixels > limits.image_pixels:
      raise ApiError(
        f'{name}: the pictures of one request may have {limits.image_pixels:,} '
        'pixels together; make them smaller',
        'messages',
      )
    picture = _decode(data, name)
    # The large one goes at once: requests wait with what is kept of it.
    found.append(Picture(pictures_lib.resize(picture, side), picture.size))
  return found


def check_count(count: int, limits: Limits) -> None:
  """ApiError if a request has more pictures than it may."""
  if count > limits.images:
    raise ApiError(
      f'{count} pictures are more than the {limits.images} of one request',
      'messages',
    )


def _size(data: bytes, name: str) -> int:
  """Pixels by the header; nothing is decoded."""
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
      return picture.size[0] * picture.size[1]
  except Image.DecompressionBombError:
    return 2**62
  except Exception as error:
    raise _unreadable(name) from error


def _decode(data: bytes, name: str) -> Image.Image:
  if data.startswith(b'\xff\xd8') and data.count(_SCAN) > _MAX_SCANS:
    raise _unreadable(name)
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
      picture.load()
      return pictures_lib.load(picture, name)
  except Exception as error:
    # Pillow's decoders raise whatever their format's code comes to.
    raise _unreadable(name) from error


def _unreadable(name: str) -> ApiError:
  return ApiError(
    f'{name} is not a readable picture of the formats {", ".join(FORMATS)}',
    'messages',
  )
