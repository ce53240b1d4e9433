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
import stat
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from qwenvl_jax.errors import BadRecordError, DataError

# Pixels of the largest picture that is opened: 80 megapixels are 240 MB. Below
# the number from which Pillow warns, so that nobody is warned and then served.
MAX_PIXELS = 80_000_000

# The EXIF tag.
_ORIENTATION = 0x0112

# How each EXIF orientation shows a stored picture, and where a point of it then
# is; w and h are the width and height of the stored one.
_TRANSPOSED = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_TURNS = {
  1: lambda x, y, w, h: (x, y),
  2: lambda x, y, w, h: (w - x, y),
  3: lambda x, y, w, h: (w - x, h - y),
  4: lambda x, y, w, h: (x, h - y),
  5: lambda x, y, w, h: (y, x),
  6: lambda x, y, w, h: (h - y, x),
  7: lambda x, y, w, h: (h - y, w - x),
  8: lambda x, y, w, h: (y, w - x),
}

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
    notes: receives the keys of `record_errors.REPAIRED` that apply.
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
    _check_regular(stream, name)
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
  except BadRecordError:
    raise
  except Exception as error:  # Pillow's readers fail in whatever way they do.
    unknown = isinstance(error, UnidentifiedImageError)
    why = 'of no known format' if unknown else error
    raise BadRecordError(
      'unreadable_image',
      f'{name}: not a readable picture ({why}); it may be cut off or of an '
      'unknown format: fetch it again or convert it to PNG or JPEG',
    ) from error


def orientation(picture: Image.Image) -> int:
  """Returns the EXIF orientation of a picture, 1 to 8; 1 if it says none."""
  # Where the EXIF block is damaged the picture itself is fine.
  with contextlib.suppress(Exception):
    found = picture.getexif().get(_ORIENTATION, 1)
    return found if found in _TURNS else 1
  return 1


def stored_orientation(data: bytes) -> int:
  """Returns the EXIF orientation of an encoded picture that `load` reads."""
  with Image.open(io.BytesIO(data)) as picture:
    return orientation(picture)


def turn(
  points: Sequence[float], size: tuple[float, float], orientation: int
) -> tuple[float, ...]:
  """Moves points of a stored picture to where `load` shows them.

  Args:
    points: x, y, x, y, ..
    size: width and height of the stored picture, in the same unit.
    orientation: EXIF's, 1 to 8.
  """
  moved = (
    _TURNS[orientation](x, y, *size)
    for x, y in zip(points[::2], points[1::2], strict=True)
  )
  return tuple(value for point in moved for value in point)


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


def _check_regular(source, name) -> None:
  """Opening a pipe or a device would wait, or never end."""
  if isinstance(source, io.BytesIO):
    return
  mode = os.stat(source).st_mode
  if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
    raise BadRecordError(
      'unreadable_image', f'{name} is no regular file; name a picture'
    )


def _name(source, record) -> str:
  file = str(source) if isinstance(source, (str, os.PathLike)) else ''
  file = pathlib.Path(file).as_posix() if file else ''
  return ': '.join(x for x in (record, file) if x) or 'the picture'


def _to_rgb(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
  if picture.mode == 'RGB' and not picture.info:
    return picture
  if (turned := _TRANSPOSED.get(orientation(picture))) is not None:
    picture = picture.transpose(turned)
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
