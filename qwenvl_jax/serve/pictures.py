"""Pictures of a request: fetched, checked by their header, decoded, resized."""

import io
from collections.abc import Sequence

from PIL import Image

from qwenvl_jax import image as pictures_lib
from qwenvl_jax.serve.fetch import fetch
from qwenvl_jax.serve.limits import FORMATS, ApiError, Limits


def open_pictures(urls: Sequence[str], limits: Limits) -> list[Image.Image]:
  """Opens all pictures of a request as RGB.

  Args:
    urls: in reading order.
    limits: budgets of the request.

  Raises:
    ApiError: too many, too large, or not a picture of `FORMATS`.
  """
  if len(urls) > limits.images:
    raise ApiError(
      f'{len(urls)} pictures are more than the {limits.images} of one request',
      'messages',
    )
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
    found.append(_decode(data, name))
  return found


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
