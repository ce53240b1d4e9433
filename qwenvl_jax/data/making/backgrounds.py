"""Natural-looking backgrounds: composed from noise, or a person's photographs.

Everything is a function of the random generator.
"""

import functools
import math
import pathlib
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from qwenvl_jax import image
from qwenvl_jax.errors import DataError

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')

# Colours from dark to light, as (red, green, blue).
_PALETTES = {
  'sky': ((70, 120, 190), (150, 190, 230), (245, 245, 245)),
  'dusk': ((40, 30, 70), (190, 90, 90), (250, 200, 140)),
  'leaves': ((20, 45, 15), (60, 110, 40), (170, 200, 90)),
  'stone': ((70, 68, 65), (130, 126, 120), (200, 196, 188)),
  'soil': ((50, 35, 22), (110, 80, 55), (170, 140, 105)),
  'water': ((10, 50, 70), (40, 110, 130), (180, 225, 225)),
  'sand': ((150, 120, 80), (205, 178, 130), (240, 225, 190)),
}
_WOODS = (
  ((70, 40, 20), (130, 80, 45), (175, 120, 75)),
  ((120, 85, 50), (185, 140, 90), (225, 190, 145)),
  ((45, 30, 25), (85, 60, 48), (120, 92, 75)),
)


def compose(rng: random.Random, size: tuple[int, int]) -> Image.Image:
  """A background of (width, height): a surface, a landscape's blur or light."""
  kind = rng.choice((_surface, _surface, _wood, _weave, _lights, _horizon))
  return kind(rng, size)


def photograph(
  rng: random.Random, size: tuple[int, int], folder: str
) -> Image.Image:
  """A part of one of a folder's pictures.

  Raises:
    DataError: there is none, or the chosen one cannot be opened.
  """
  picture = image.load(rng.choice(pictures(folder)))
  zoom, centre = rng.uniform(1.0, 1.5), (rng.random(), rng.random())
  return ImageOps.fit(picture, size, bleed=(1 - 1 / zoom) / 2, centering=centre)


@functools.lru_cache(maxsize=8)
def pictures(folder: str) -> tuple[str, ...]:
  """The picture files of a folder.

  Raises:
    DataError: there is none.
  """
  found = tuple(
    str(path)
    for path in sorted(pathlib.Path(folder).expanduser().rglob('*'))
    if path.suffix.lower() in _SUFFIXES and path.is_file()
  )
  if not found:
    raise DataError(
      f'{folder} holds no picture ({", ".join(_SUFFIXES)}); leave out '
      '--backgrounds to have backgrounds composed'
    )
  return found


def noise(
  rng: random.Random,
  size: tuple[int, int],
  cells: float = 4.0,
  stretch: tuple[float, float] = (1.0, 1.0),
  octaves: int = 6,
) -> np.ndarray:
  """[height,width] float32 from 0 to 1: clouds, each octave half as strong.

  Args:
    rng: decides everything.
    size: width and height.
    cells: waves along the longer side in the first octave.
    stretch: factors of the waves' length across and down.
    octaves: how many are added.
  """
  draw = np.random.default_rng(rng.getrandbits(32))
  width, height = size
  total = np.zeros((height, width), np.float32)
  for octave in range(octaves):
    waves = cells * 2**octave / max(size)
    grid = (
      min(height, 2 + int(height * waves / stretch[1])),
      min(width, 2 + int(width * waves / stretch[0])),
    )
    layer = Image.fromarray(draw.random(grid, np.float32))
    layer = layer.resize(size, Image.Resampling.BICUBIC)
    total += np.asarray(layer) / 2**octave
  total -= total.min()
  return total / max(float(total.max()), 1e-6)


def _coloured(values: np.ndarray, palette) -> Image.Image:
  """Values from 0 to 1 in the colours of a palette, from dark to light."""
  stops = np.linspace(0, 1, len(palette))
  channels = [
    np.interp(values, stops, [colour[i] for colour in palette])
    for i in range(3)
  ]
  return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _surface(rng, size):
  palette = _PALETTES[rng.choice(list(_PALETTES))]
  values = noise(rng, size, rng.uniform(2, 12))
  grain = noise(rng, size, 80, octaves=3)
  return _coloured(values * 0.8 + grain * 0.2, palette)


def _wood(rng, size):
  stretch = (rng.uniform(6, 14), 0.6)
  if rng.random() < 0.5:
    stretch = stretch[::-1]
  values = noise(rng, size, 6, stretch)
  rings = np.sin(values * rng.uniform(20, 50)) * 0.5 + 0.5
  return _coloured(0.65 * values + 0.35 * rings, rng.choice(_WOODS))


def _weave(rng, size):
  """Cloth: two sets of threads over an uneven colour."""
  width, height = size
  period = rng.uniform(3, 8)
  across = np.sin(np.arange(width) * (2 * math.pi / period))[None]
  down = np.sin(np.arange(height) * (2 * math.pi / period))[:, None]
  threads = np.where(across * down > 0, across, down) * 0.5 + 0.5
  values = 0.3 * threads + 0.7 * noise(rng, size, 3)
  return _coloured(values, _PALETTES[rng.choice(list(_PALETTES))])


def _lights(rng, size):
  """Lights out of focus before a dark ground."""
  picture = _coloured(noise(rng, size, 2) * 0.4, _PALETTES['dusk'])
  for _ in range(rng.randint(8, 30)):
    radius = max(3, round(rng.uniform(0.02, 0.12) * max(size)))
    light = Image.new('L', (2 * radius + 12, 2 * radius + 12))
    ImageDraw.Draw(light).ellipse(
      (6, 6, 2 * radius + 6, 2 * radius + 6), fill=rng.randint(40, 140)
    )
    light = light.filter(ImageFilter.GaussianBlur(2))
    colour = tuple(rng.randint(120, 255) for _ in range(3))
    at = [rng.randint(-radius, side - radius) for side in size]
    picture.paste(colour, tuple(at), light)
  return picture


def _horizon(rng, size):
  """Sky above ground, out of focus."""
  width, height = size
  line = rng.uniform(0.3, 0.7) * height
  hills = noise(rng, (width, 1), rng.uniform(2, 6), octaves=4)[0]
  edge = line + (hills - 0.5) * height * rng.uniform(0.05, 0.35)
  ground = np.arange(height)[:, None] > edge[None]
  mask = Image.fromarray((ground * 255).astype(np.uint8))
  picture = _coloured(
    noise(rng, size, 3, (3.0, 1.0)), _PALETTES[rng.choice(('sky', 'dusk'))]
  )
  below = _coloured(
    noise(rng, size, 10),
    _PALETTES[rng.choice(('leaves', 'soil', 'sand', 'water', 'stone'))],
  )
  picture.paste(below, mask=mask)
  return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 4)))
