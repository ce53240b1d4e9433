"""Cuts the sprite sheet out of Debian's Noto Color Emoji font.

  apt-get install fonts-noto-color-emoji
  python -m qwenvl_jax.data.builders.make_sprites

writes `assets/sprites.png`: one row of 64-pixel cells, one for each
of `qwenvl_jax.data.things.THINGS` in order, transparent around the picture.
Each picture is cut to its visible pixels and scaled so that its longer side
fills the cell; it stands in the cell's upper left corner.
"""

import pathlib
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwenvl_jax.data.things import THINGS

FONT = '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'
# The only size of the font's bitmaps.
FONT_SIZE = 109
CELL = 64
# Fainter pixels (a candle's glow) do not count as part of the thing.
VISIBLE = 100


def cut(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
  """One emoji as a [CELL,CELL] RGBA picture."""
  canvas = Image.new('RGBA', (2 * FONT_SIZE, 2 * FONT_SIZE))
  ImageDraw.Draw(canvas).text((0, 0), emoji, font=font, embedded_color=True)
  rows, columns = np.nonzero(np.asarray(canvas)[..., 3] >= VISIBLE)
  box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
  picture = canvas.crop(tuple(int(x) for x in box))
  scale = CELL / max(picture.size)
  size = tuple(max(1, round(side * scale)) for side in picture.size)
  cell = Image.new('RGBA', (CELL, CELL))
  cell.paste(picture.resize(size, Image.Resampling.LANCZOS), (0, 0))
  return cell


def main(font_file: str = FONT) -> None:
  """Writes `assets/sprites.png`, a cell for each of `THINGS`, from a font."""
  font = ImageFont.truetype(font_file, FONT_SIZE)
  sheet = Image.new('RGBA', (CELL * len(THINGS), CELL))
  for index, thing in enumerate(THINGS):
    sheet.paste(cut(thing.emoji, font), (index * CELL, 0))
  target = pathlib.Path(__file__).parent / 'assets' / 'sprites.png'
  sheet.save(target, optimize=True)
  print(f'{target}: {len(THINGS)} sprites, {target.stat().st_size} bytes')


if __name__ == '__main__':
  main(*sys.argv[1:])
