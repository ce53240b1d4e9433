"""Opens pictures, whatever they are, and squashes them to the model's square.

Rules: the first frame of an animation; EXIF orientation applied; transparent
pixels on white; 16 bits scaled to 8, wider integers and floats by their maximum
if that is above 255; everything to RGB. Aspect ratio is not kept, as in the
release.
"""

import contextlib
import io
import os
import pathlib

import numpy as np
from PIL import Image, ImageOps

from qwenvl_jax.errors import BadRecordError, DataError

# Pixels of the largest picture that is opened: 80 megapixels are 240 MB. Below
# the number from which Pillow warns, so that nobody is warned and then served.
MAX_PIXELS = 80_000_000

# The EXIF tag.
_ORIENTATION = 0x0112

# Pixels of the shortest side that is worth learning from.
MIN_SIDE = 8


def load(
  source: object,
  record: str = '',
  notes: list[str] | None = None,
  min_side: int = 1,
) -> Image.Image:
  """Opens a picture as RGB.

  Args:
    source: encoded bytes, a path, a PIL image, or a [H,W,3] uint8 array.
    record: what an error names, besides the file.
    notes: receives the keys of `bad.REPAIRED` that apply.
    min_side: pixels of the shortest side that is accepted.

  Raises:
    BadRecordError: not a picture, cut off, too small or too large.
    DataError: an array of another kind, or a path that is no file.
  """
  notes = [] if notes is None else notes
  name = _name(source, record)
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
      raise DataError(
        f'{name}: an array of {source.dtype} {source.shape} is not a picture; '
        'give uint8 [height, width, 3]'
      )
    return Image.fromarray(source)
  if isinstance(source, Image.Image):
    return _to_rgb(source, name, notes)
  stream = source
  if isinstance(source, (bytes, bytearray, memoryview)):
    stream = io.BytesIO(source)
  try:
    with Image.open(stream) as picture:
      width, height = picture.size
      if width * height > MAX_PIXELS:
        raise BadRecordError(
          'too_many_pixels',
          f'{name}: {width} x {height} pixels are more than '
          f'{MAX_PIXELS:,}; make the picture smaller',
        )
      if min(width, height) < min_side:
        raise BadRecordError(
          'tiny_image',
          f'{name}: {width} x {height} pixels, but a side needs {min_side}; '
          'leave the picture out',
        )
      picture.load()
      if getattr(picture, 'is_animated', False):
        notes.append('first_frame')
      return _to_rgb(picture, name, notes)
  except Image.DecompressionBombError as error:
    raise BadRecordError(
      'too_many_pixels',
      f'{name}: more than {MAX_PIXELS:,} pixels; make the picture smaller',
    ) from error
  except FileNotFoundError as error:
    raise DataError(f'{name}: no such file; check the path') from error
  except IsADirectoryError as error:
    raise DataError(f'{name} is a folder; name a picture in it') from error
  except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
    raise BadRecordError(
      'unreadable_image',
      f'{name}: not a readable picture ({error}); it may be cut off or of an '
      'unknown format: fetch it again or convert it to PNG or JPEG',
    ) from error


def resize(picture: Image.Image, size: int) -> np.ndarray:
  """[size,size,3] uint8: Pillow's bicubic on 8 bits, as in the release."""
  if picture.size != (size, size):
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(picture)


def pixels(
  source: object,
  size: int,
  record: str = '',
  notes: list[str] | None = None,
  min_side: int = 1,
) -> np.ndarray:
  """`load` and `resize`: [size,size,3] uint8."""
  return resize(load(source, record, notes, min_side), size)


def _name(source, record) -> str:
  file = str(source) if isinstance(source, (str, os.PathLike)) else ''
  file = pathlib.Path(file).as_posix() if file else ''
  return ': '.join(x for x in (record, file) if x) or 'the picture'


def _to_rgb(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
  if picture.mode == 'RGB' and not picture.info:
    return picture
  # Where the EXIF block is damaged the picture itself is fine.
  with contextlib.suppress(ValueError, TypeError, SyntaxError, KeyError):
    if picture.getexif().get(_ORIENTATION, 1) != 1:
      picture = ImageOps.exif_transpose(picture)
      notes.append('rotated')
  if picture.mode == 'RGB' and 'transparency' not in picture.info:
    return picture
  if picture.mode.startswith('I') or picture.mode == 'F':
    picture = _to_8_bits(picture)
  if picture.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or (
    'transparency' in picture.info
  ):
    picture = picture.convert('RGBA')
    notes.append('flattened')
    white = Image.new('RGBA', picture.size, 'white')
    picture = Image.alpha_composite(white, picture)
  else:
    notes.append('converted')
  try:
    return picture.convert('RGB')
  except ValueError as error:
    raise BadRecordError(
      'unreadable_image',
      f'{name}: pictures of mode {picture.mode} are not supported; convert it '
      'to PNG or JPEG',
    ) from error


def _to_8_bits(picture: Image.Image) -> Image.Image:
  values = np.nan_to_num(np.asarray(picture, np.float64))
  sixteen = picture.mode.startswith('I;16')
  top = 65535.0 if sixteen else max(float(values.max()), 255.0)
  scaled = np.clip(values * (255.0 / top), 0, 255)
  return Image.fromarray(np.round(scaled).astype(np.uint8))
