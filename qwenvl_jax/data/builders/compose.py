"""Draws one scene: sprites and perhaps a word on a textured background.

A pure function of its random generator, without files or records, so that the
builder, the tests and the pictures in a report all draw the same way.
"""

import colorsys
import dataclasses
import functools
import math
import pathlib
import random

import numpy as np
from PIL import Image, ImageDraw

from qwenvl_jax.data import things
from qwenvl_jax.data.records import Object, Scene, Word, scene
from qwenvl_jax.errors import DataError
from qwenvl_jax.text import fonts

ASSETS = pathlib.Path(__file__).parent / 'assets'
CELL = 64


@dataclasses.dataclass(frozen=True)
class Style:
  """What scenes look like.

  Attributes:
    side: of the square picture, in pixels.
    classes: how many of `things.THINGS` occur.
    sprite: smallest and largest longer side of a sprite, in pixels.
    lattice: sides and corners of boxes, and of words that are not turned, are
      multiples of this many pixels, so that few coordinates occur and a small
      model can learn to write them.
    counts: relative frequency of scenes with 1, 2, .. sprites.
    repeat: chance that a further sprite is of a class already there.
    overlap: largest share of the smaller box that two boxes may share.
    text: chance of a painted word; such a scene has at most two sprites.
    words: how many of `things.WORDS_EN` and of `things.WORDS_ZH` occur.
    font: smallest and largest font size, before a word is stretched to the
      lattice.
    tilt: largest angle of a word, in degrees.
  """

  side: int = 84
  classes: int = 16
  sprite: tuple[int, int] = (21, 42)
  lattice: int = 7
  counts: tuple[float, ...] = (0.35, 0.4, 0.25)
  repeat: float = 0.25
  overlap: float = 0.05
  text: float = 0.35
  words: int = 4
  font: tuple[int, int] = (18, 24)
  tilt: float = 0.0


def compose(rng: random.Random, style: Style, combos: bool = False) -> Scene:
  """Draws a scene, which has no id yet and a Pillow picture for its image.

  Args:
    rng: decides everything.
    style: what scenes look like.
    combos: whether at least one object stands on a colour that `held_out`
      reserves; otherwise none does.
  """
  colour = rng.randrange(len(things.COLOURS))
  texture = rng.choice(things.TEXTURES)
  picture = _background(rng, style.side, things.COLOURS[colour], texture)
  boxes, words = [], []
  if rng.random() < style.text:
    painted, around = _paint_word(rng, style, picture)
    words.append(painted)
    boxes.append(around)
  count = rng.choices(range(1, len(style.counts) + 1), style.counts)[0]
  if words:
    count = min(count, 2)
  objects = []
  for thing in _choose_things(rng, style, colour, count, combos):
    box = _place(rng, style, thing, boxes, needed=not objects)
    if box is None:
      continue
    boxes.append(box)
    sprite = _sprite(
      thing, max(box[2] - box[0], box[3] - box[1]), style.lattice
    )
    picture.paste(sprite, box[:2], sprite)
    objects.append(Object(thing, box))
  return scene('', picture, style.side, objects, colour, texture, words)


def _choose_things(rng, style, colour, count, combos):
  everything = range(style.classes)
  reserved = [x for x in everything if things.held_out(x, colour)]
  allowed = [x for x in everything if combos or x not in reserved]
  first = rng.choice(reserved if combos and reserved else allowed)
  chosen = [first]
  while len(chosen) < count:
    if rng.random() < style.repeat:
      chosen.append(rng.choice(chosen))
    else:
      chosen.append(rng.choice([x for x in allowed if x not in chosen]))
  return chosen


def _place(rng, style, thing, boxes, needed):
  """A free box for a sprite, or None if the picture is too full.

  A scene needs one object: if there is no room beside the word, it covers it.
  """
  step = style.lattice
  low, high = (-(-style.sprite[0] // step), style.sprite[1] // step)
  for attempt in range(40):
    # Later tries are smaller, so that a crowded picture still fills.
    size = step * rng.randint(low, max(low, high - attempt // 8))
    width, height = _sprite(thing, size, step).size
    x = step * rng.randint(0, (style.side - width) // step)
    y = step * rng.randint(0, (style.side - height) // step)
    box = (x, y, x + width, y + height)
    if all(_shared(box, other) <= style.overlap for other in boxes):
      return box
  return box if needed else None


def _shared(a, b) -> float:
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  if width <= 0 or height <= 0:
    return 0.0
  areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
  return width * height / min(areas)


@functools.lru_cache(maxsize=1)
def _sheet() -> Image.Image:
  file = ASSETS / 'sprites.png'
  if not file.exists():
    raise DataError(
      f'{file} is missing: reinstall the package, or run '
      'python -m qwenvl_jax.data.builders.make_sprites'
    )
  return Image.open(file).convert('RGBA')


@functools.lru_cache(maxsize=4096)
def _sprite(thing: int, size: int, lattice: int) -> Image.Image:
  """RGBA picture whose longer side is `size` and that has no empty border.

  Its shorter side is rounded to a multiple of `lattice`.
  """
  cell = _sheet().crop((thing * CELL, 0, (thing + 1) * CELL, CELL))
  cell = cell.crop(cell.getbbox())
  scale = size / max(cell.size)
  shape = tuple(
    lattice * max(1, round(side * scale / lattice)) for side in cell.size
  )
  return cell.resize(shape, Image.Resampling.LANCZOS)


def _background(rng, side, colour, texture) -> Image.Image:
  """Two shades of one colour, mixed by the texture's pattern."""
  shades = []
  for _ in range(2):
    hue = (colour.hue + rng.uniform(-6, 6)) % 360 / 360
    saturation = rng.uniform(*colour.saturation)
    value = rng.uniform(*colour.value)
    shades.append(colorsys.hsv_to_rgb(hue, saturation, value))
  first, second = 255 * np.array(shades)
  mix = np.linspace(0, 1, 256)[:, None]
  palette = np.round(first + mix * (second - first)).astype(np.uint8)
  # Pillow looks colours up several times faster than NumPy does.
  picture = Image.fromarray(_pattern(rng, side, texture))
  picture.putpalette(palette.tobytes())
  return picture.convert('RGB')


def _pattern(rng, side, texture):
  """[side,side] uint8, 0 for one shade and 255 for the other."""
  if texture == 'plain':
    return np.zeros((side, side), np.uint8)
  if texture == 'noise':
    noise = np.random.default_rng(rng.getrandbits(32))
    grain = rng.choice((2, 4, 8))
    cells = -(-side // grain)
    small = noise.integers(0, 256, (cells, cells), np.uint8)
    large = small.repeat(grain, axis=0).repeat(grain, axis=1)
    return large[:side, :side]
  angle = rng.uniform(0, math.pi)
  axis = np.arange(side, dtype=np.float32)
  along = math.cos(angle) * axis[None] + math.sin(angle) * axis[:, None]
  if texture == 'gradient':
    along -= along.min()
    return (along * (255 / along.max())).astype(np.uint8)
  period = rng.uniform(8, 28)
  bands = np.floor(along / period).astype(np.int32)
  if texture == 'checks':
    across = -math.sin(angle) * axis[None] + math.cos(angle) * axis[:, None]
    bands += np.floor(across / period).astype(np.int32)
  return ((bands & 1) * 255).astype(np.uint8)


@functools.lru_cache(maxsize=4096)
def _word_mask(word: str, size: int, lattice: int, most: int) -> Image.Image:
  """The word in white on black, cut to its pixels.

  Both sides are stretched to the next multiple of `lattice`, but not beyond the
  last one within `most` pixels.
  """
  # The packaged font, so that scenes are the same on every machine.
  font, _ = fonts.find_font(word, size, system=False)
  left, top, right, bottom = font.getbbox(word)
  mask = Image.new('L', (right - left, bottom - top))
  ImageDraw.Draw(mask).text((-left, -top), word, fill=255, font=font)
  mask = mask.crop(mask.getbbox())
  shape = tuple(
    lattice * min(-(-side // lattice), most // lattice) for side in mask.size
  )
  return mask.resize(shape, Image.Resampling.LANCZOS)


def _paint_word(rng, style, picture) -> tuple[Word, tuple]:
  """Paints a word and returns it with the upright box around it."""
  word = rng.choice(
    things.WORDS_EN[: style.words] + things.WORDS_ZH[: style.words]
  )
  size = rng.randint(*style.font)
  mask = _word_mask(word, size, style.lattice, style.side)
  width, height = mask.size
  angle = math.radians(rng.uniform(-style.tilt, style.tilt))
  cos, sin = math.cos(angle), math.sin(angle)
  outer_width = width * cos + height * abs(sin)
  outer_height = width * abs(sin) + height * cos
  x = _centre(rng, style, width, outer_width)
  y = _centre(rng, style, height, outer_height)
  quad = tuple(
    (x + cos * u - sin * v, y + sin * u + cos * v)
    for u, v in (
      (-width / 2, -height / 2),
      (width / 2, -height / 2),
      (width / 2, height / 2),
      (-width / 2, height / 2),
    )
  )
  # For each pixel of the picture, where in the mask it comes from.
  back = (
    cos, sin, width / 2 - cos * x - sin * y,
    -sin, cos, height / 2 + sin * x - cos * y,
  )  # fmt: skip
  turned = mask.transform(
    picture.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
  )
  brightness = np.asarray(picture).mean()
  light = brightness < 110 or (brightness < 150 and rng.random() < 0.5)
  picture.paste((255, 255, 255) if light else (0, 0, 0), mask=turned)
  around = (
    x - outer_width / 2,
    y - outer_height / 2,
    x + outer_width / 2,
    y + outer_height / 2,
  )
  return Word(word, quad), around


def _centre(rng, style, length: int, outer: float) -> float:
  """Where on an axis a word may have its centre, unturned on the lattice."""
  first = math.ceil((outer - length) / 2 / style.lattice)
  last = int((style.side - (outer + length) / 2) // style.lattice)
  return style.lattice * rng.randint(first, max(first, last)) + length / 2
