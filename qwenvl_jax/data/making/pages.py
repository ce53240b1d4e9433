"""Pages in the manner of SynthDoG: text on paper, photographed somewhere.

Text is drawn upright on a sheet and measured by its ink; the sheet is laid on
a background in perspective, and the quads go through the same map, so that
they are exact.
"""

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from qwenvl_jax.data.making import backgrounds
from qwenvl_jax.data.making.page import Page, Quad, readable, upright
from qwenvl_jax.data.making.typefaces import Typeface, of_language
from qwenvl_jax.data.making.words import Words
from qwenvl_jax.data.records import Word


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
  """What pages look like.

  Attributes:
    side: shortest and longest longer side of the picture, in pixels.
    letters: smallest and largest height of letters, as a share of the sheet's
      shorter side.
    smallest: pixels below which no letter is drawn.
    columns: relative frequency of sheets with 1, 2, .. columns.
    lines: lines on a sheet at most.
    bare: share of pictures whose text stands on the background itself.
    tilt: how far a corner of the sheet moves at most, as a share of its side.
    turn: largest angle of the sheet, in degrees.
    blur: largest radius, in pixels.
    noise: largest deviation, in grey levels.
  """

  side: tuple[int, int] = (640, 1120)
  letters: tuple[float, float] = (0.022, 0.075)
  smallest: int = 13
  columns: tuple[float, ...] = (0.65, 0.35)
  lines: int = 36
  bare: float = 0.2
  tilt: float = 0.07
  turn: float = 8.0
  blur: float = 0.7
  noise: float = 9.0


def draw(
  rng: random.Random,
  style: Style,
  words: Words,
  faces: Sequence[Typeface],
  language: str,
  photographs: str | None = None,
) -> Page:
  """A page in one language.

  Args:
    rng: decides everything.
    style: what pages look like.
    words: what is written.
    faces: the fonts; those that write the language are used.
    language: 'en' or 'zh'.
    photographs: a folder of backgrounds; None to compose them.
  """
  size = _size(rng, style)
  if photographs is None:
    ground = backgrounds.compose(rng, size)
  else:
    ground = backgrounds.photograph(rng, size, photographs)
  sheet_size = tuple(round(side * rng.uniform(0.72, 0.95)) for side in size)
  bare = rng.random() < style.bare
  corners = _corners(rng, style, size, sheet_size)
  to_picture = homography(upright(0, 0, *sheet_size), corners)
  sheet, ink = _paper(rng, sheet_size)
  if bare:
    ink = _ink_for(ground)
  mask = Image.new('L', sheet_size)
  lines = _write(rng, style, words, faces, language, mask)
  picture = ground
  if not bare:
    _shadow(rng, picture, corners)
    sheet.paste(ink, mask=mask)
    whole = Image.new('L', sheet_size, 255)
    _lay(picture, sheet, whole, to_picture)
  else:
    _lay(picture, Image.new('RGB', sheet_size, ink), mask, to_picture)
  placed = tuple(
    Word(line.word, transform(to_picture, line.quad)) for line in lines
  )
  return Page(_photograph(rng, style, picture), placed)


def _size(rng, style):
  longer = rng.randint(*style.side)
  shorter = round(longer * rng.uniform(0.6, 1.0))
  return rng.choice(((longer, shorter), (shorter, longer)))


def _corners(rng, style, size, sheet_size) -> Quad:
  """Where the sheet's corners come to lie; within the picture.

  The farther out, the smaller the sheet is made until it fits.
  """
  width, height = sheet_size
  angle = math.radians(rng.uniform(-style.turn, style.turn))
  cos, sin = math.cos(angle), math.sin(angle)
  points = []
  for x, y in upright(-width / 2, -height / 2, width / 2, height / 2):
    x += rng.uniform(-style.tilt, style.tilt) * width
    y += rng.uniform(-style.tilt, style.tilt) * height
    points.append((cos * x - sin * y, sin * x + cos * y))
  xs, ys = zip(*points)
  spans = max(xs) - min(xs), max(ys) - min(ys)
  scale = min(1.0, *(0.985 * s / span for s, span in zip(size, spans)))
  moves = [
    rng.uniform(0, side - scale * span) - scale * low
    for side, span, low in zip(size, spans, (min(xs), min(ys)))
  ]
  return tuple((scale * x + moves[0], scale * y + moves[1]) for x, y in points)


def homography(source: Quad, target: Quad) -> np.ndarray:
  """[3,3]: the perspective map that takes four points to four others."""
  rows, values = [], []
  for (x, y), (u, v) in zip(source, target):
    rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
    rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    values += [u, v]
  solved = np.linalg.solve(np.array(rows, float), np.array(values, float))
  return np.append(solved, 1.0).reshape(3, 3)


def transform(matrix: np.ndarray, points: Quad) -> Quad:
  """Moves points through a perspective map.

  Args:
    matrix: [3, 3] float, from pixels to pixels, of homogeneous coordinates.
    points: four points (x, y), in pixels.
  """
  moved = matrix @ np.array([(x, y, 1.0) for x, y in points]).T
  return tuple(
    (float(x), float(y)) for x, y in zip(*(moved[:2] / moved[2:]).tolist())
  )


def _lay(picture, sheet, mask, to_picture):
  """Pastes the sheet in perspective."""
  back = np.linalg.inv(to_picture)
  back = (back / back[2, 2]).ravel()[:8].tolist()
  where = Image.Transform.PERSPECTIVE
  how = Image.Resampling.BICUBIC
  turned = sheet.transform(picture.size, where, back, how)
  mask = mask.transform(picture.size, where, back, how)
  picture.paste(turned, mask=mask)


def _shadow(rng, picture, corners):
  shadow = Image.new('L', picture.size)
  shift = rng.uniform(2, 10)
  ImageDraw.Draw(shadow).polygon(
    [(x + shift, y + shift) for x, y in corners], fill=rng.randint(60, 150)
  )
  shadow = shadow.filter(ImageFilter.GaussianBlur(rng.uniform(3, 9)))
  picture.paste((0, 0, 0), mask=shadow)


def _paper(rng, size) -> tuple[Image.Image, tuple[int, int, int]]:
  """A sheet and a colour to write on it: dark on light or light on dark."""
  uneven = backgrounds.noise(rng, size, rng.uniform(1, 4))
  fibres = backgrounds.noise(rng, size, 120, octaves=2)
  values = (uneven - 0.5) * rng.uniform(4, 24) + (fibres - 0.5) * 10
  dark = rng.random() < 0.12
  if dark:
    colour = [rng.randint(15, 70) for _ in range(3)]
    ink = tuple(rng.randint(205, 255) for _ in range(3))
  else:
    base, warm = rng.randint(222, 252), rng.uniform(0, 24)
    colour = [base, base - 0.3 * warm, base - warm]
    ink = tuple(rng.randint(0, 70) for _ in range(3))
    if rng.random() < 0.15:
      ink = rng.choice(((20, 40, 130), (140, 20, 20), (15, 80, 40)))
  pixels = np.array(colour)[None, None] + values[..., None]
  return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), ink


def _ink_for(ground) -> tuple[int, int, int]:
  """White or black, whichever can be read on all of a background."""
  grey = np.asarray(ground.convert('L'), np.float32)
  low, high = np.percentile(grey, (3, 97))
  return (255, 255, 255) if 255 - high > low else (0, 0, 0)


def _write(rng, style, words, faces, language, mask) -> list[Word]:
  """Writes on a sheet, white on black; gives lines in the sheet's pixels."""
  width, height = mask.size
  margin = rng.uniform(0.03, 0.08) * min(mask.size)
  columns = 1 + rng.choices(range(len(style.columns)), style.columns)[0]
  gap = 0.05 * width
  column = (width - 2 * margin - gap * (columns - 1)) / columns
  lines = []
  for number in range(columns):
    left = margin + number * (column + gap)
    top = margin
    while len(lines) < style.lines:
      face = rng.choice(of_language(faces, language))
      size = max(
        style.smallest, round(rng.uniform(*style.letters) * min(mask.size))
      )
      # Blocks of one font: a heading, a paragraph.
      block = _block(
        rng,
        words,
        face,
        size,
        language,
        mask,
        (left, top, column, height - margin),
        min(rng.choice((1, 3, 5, 8)), style.lines - len(lines)),
      )
      if not block:
        break
      lines += block
      top = max(y for line in block for _, y in line.quad)
      top += size * rng.uniform(0.6, 1.6)
  return lines


def _block(rng, words, face, size, language, mask, place, count) -> list[Word]:
  left, top, column, bottom = place
  font = face.font(size)
  pieces = words.pieces(rng, language, face.characters)
  spacing = rng.uniform(1.15, 1.7)
  align = rng.choice((0.0, 0.0, 0.0, 0.5, 1.0))
  pen = ImageDraw.Draw(mask)
  lines, waiting = [], ''
  for number in range(count):
    y = top + number * spacing * size
    if y + 1.3 * size > bottom:
      break
    text, waiting = _fill(font, waiting, pieces, column)
    # The last line of a paragraph is rarely full.
    if number == count - 1 and count > 1 and language == 'en':
      text = ' '.join(text.split()[: max(1, round(len(text.split()) * 0.6))])
    text = readable(text)
    if not text:
      continue
    x = left + align * (column - font.getlength(text))
    box = font.getbbox(text)
    quad = upright(*(v + (x, y)[i % 2] for i, v in enumerate(box)))
    ink = _ink(pen, mask, (x, y), text, font, quad)
    if ink is not None:
      lines.append(Word(text, upright(*ink)))
  return lines


def _fill(font, waiting, pieces, width) -> tuple[str, str]:
  """As much text as fits a line, at least one piece; and the piece after."""
  text = waiting
  while True:
    piece = next(pieces)
    longer = font.getlength((text + piece).rstrip())
    if text and longer > width:
      return text, piece
    text += piece
    if longer > width:  # One piece wider than the line: a part of it.
      while len(text) > 1 and font.getlength(text.rstrip()) > width:
        text = text[:-1]
      return text, ''


def _ink(pen, mask, at, text, font, quad):
  """Draws a line and gives the box of its pixels; None if it has none."""
  x, y = round(at[0]), round(at[1])
  pad = 4 + round(font.size / 2)
  left, top = round(quad[0][0]) - pad, round(quad[0][1]) - pad
  right, bottom = round(quad[2][0]) + pad, round(quad[2][1]) + pad
  alone = Image.new('L', (right - left, bottom - top))
  ImageDraw.Draw(alone).text((x - left, y - top), text, fill=255, font=font)
  box = alone.getbbox()
  if box is None:
    return None
  box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
  if box[0] < 0 or box[1] < 0 or box[2] > mask.width or box[3] > mask.height:
    return None
  pen.text((x, y), text, fill=255, font=font)
  return box


def _photograph(rng, style, picture) -> Image.Image:
  """As a camera would see it: light, blur, noise."""
  picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.8, 1.12))
  picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.8, 1.15))
  if rng.random() < 0.5:
    radius = rng.uniform(0, style.blur)
    picture = picture.filter(ImageFilter.GaussianBlur(radius))
  deviation = rng.uniform(0, style.noise)
  draw = np.random.default_rng(rng.getrandbits(32))
  pixels = np.asarray(picture, np.float32)
  pixels = pixels + deviation * draw.standard_normal(pixels.shape, np.float32)
  return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
