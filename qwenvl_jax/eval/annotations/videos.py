"""Frames of videos."""

import functools
import pathlib

import numpy as np
from PIL import Image

from qwenvl_jax.errors import ConfigError, DataError


def uniform(count: int, wanted: int) -> list[int]:
  """Returns the indices of evenly spaced frames, as SEED-Bench's script does.

  >>> uniform(100, 4)
  [12, 37, 62, 86]
  """
  if wanted > count:
    return list(range(count))
  step = (count - 1) / wanted
  return [int(step / 2) + int(np.round(step * i)) for i in range(wanted)]


@functools.lru_cache(maxsize=4)
def frames(
  file: pathlib.Path,
  wanted: int,
  start: float | None = None,
  end: float | None = None,
  in_seconds: bool = True,
) -> tuple[Image.Image, ...]:
  """Returns evenly spaced frames of a video, or of a part of it.

  Args:
    start: of the part; None for the whole video.
    in_seconds: whether these are seconds, or numbers of frames.

  Raises:
    DataError: it cannot be read, or has no frames there.
    ConfigError: PyAV is not installed.
  """
  try:
    import av
  except ImportError as error:
    raise ConfigError(
      f'{file}: videos need PyAV; pip install "qwenvl_jax[eval]", or put the '
      'frames beside it as the release stores them'
    ) from error
  try:
    count, rate = _length(av, file)
    if start is None or end is None:
      # The release leaves the last frame out.
      indices = uniform(count - 1, wanted)
    else:
      scale = rate if in_seconds else 1.0
      last = count - 1 if in_seconds else count
      first = int(min(max(start * scale, 0), count - 1))
      final = int(min(max(end * scale, 0), last))
      indices = [first + x for x in uniform(final - first, wanted)]
    if not indices:
      raise DataError(f'{file}: no frame from {start} to {end}')
    with av.open(str(file)) as container:
      found = {}
      for number, frame in enumerate(container.decode(video=0)):
        if number in indices:
          found[number] = frame.to_image()
        if number >= max(indices):
          break
    return tuple(found[index] for index in indices)
  except (av.FFmpegError, OSError, KeyError, IndexError) as error:
    raise DataError(
      f'{file} is no video that can be read ({error}); download it again'
    ) from error


def _length(av, file: pathlib.Path) -> tuple[int, float]:
  """Frames of a video, and how many a second."""
  with av.open(str(file)) as container:
    stream = container.streams.video[0]
    rate = float(stream.average_rate or 0)
    count = stream.frames or sum(1 for _ in container.decode(video=0))
  return count, rate
