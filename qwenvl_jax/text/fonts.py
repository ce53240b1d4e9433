"""Fonts that can show a text: the system's, a packaged one, Pillow's own.

Which characters a font holds is read from its `cmap` table, because Pillow
draws a box for a missing glyph without saying so.
"""

import functools
import logging
import pathlib
import unicodedata

from PIL import ImageFont

# Regular sans-serif fonts with Chinese, then fonts with other scripts, where
# Linux distributions, macOS and Windows put them.
SYSTEM_FONTS = (
  '/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc',
  '/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc',
  '/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc',
  '/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc',
  '/usr/share/fonts/truetype/wqy/wqy-microhei.ttc',
  '/usr/share/fonts/wqy-microhei/wqy-microhei.ttc',
  '/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc',
  '/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf',
  '/System/Library/Fonts/PingFang.ttc',
  '/System/Library/Fonts/Hiragino Sans GB.ttc',
  '/System/Library/Fonts/STHeiti Medium.ttc',
  '/Library/Fonts/Arial Unicode.ttf',
  'C:/Windows/Fonts/msyh.ttc',
  'C:/Windows/Fonts/simhei.ttf',
  'C:/Windows/Fonts/simsun.ttc',
  '/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf',
  '/usr/share/fonts/dejavu-sans-fonts/DejaVuSans.ttf',
  '/usr/share/fonts/TTF/DejaVuSans.ttf',
)
# ASCII, Latin-1 and about 1,000 Chinese characters; see its README.md.
PACKAGED_FONT = pathlib.Path(__file__).parent / 'assets' / 'labels.ttf'

# Nothing is drawn for these, so no font has to hold them.
_INVISIBLE = ('Cc', 'Cf', 'Mn', 'Zl', 'Zp', 'Zs')


def find_font(
  text: str, size: int, system: bool = True
) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, str]:
  """The first font that shows all of `text`, else the one that shows most.

  Args:
    text: what will be drawn.
    size: height in pixels.
    system: False to look at the packaged font only, so that pictures come out
      the same on every machine.

  Returns:
    The font, and the characters of `text` that it lacks (each once, in order);
    draw `printable(text, missing)`.
  """
  wanted = dict.fromkeys(
    c for c in text if unicodedata.category(c) not in _INVISIBLE
  )
  best, best_missing = None, ''.join(wanted)
  for path in (*(SYSTEM_FONTS if system else ()), str(PACKAGED_FONT)):
    held = characters(path)
    missing = ''.join(c for c in wanted if ord(c) not in held)
    if held and (best is None or len(missing) < len(best_missing)):
      font = open_font(path, size)
      if font is not None:
        best, best_missing = font, missing
    if best is not None and not best_missing:
      break
  if best is None:
    best = _pillow_font(size)
    # Both of Pillow's own fonts hold Latin-1, and only that is safe to draw.
    best_missing = ''.join(c for c in wanted if ord(c) > 0xFF)
  return best, best_missing


def printable(text: str, missing: str = '') -> str:
  """One line of `text` with `?` for the characters that a font lacks."""
  shown = (
    '?' if c in missing else ' ' if c.isspace() else c
    for c in text
    if c.isspace() or unicodedata.category(c) not in ('Cc', 'Cf')
  )
  return ''.join(shown).strip()


@functools.lru_cache(maxsize=512)
def open_font(path: str, size: int) -> ImageFont.FreeTypeFont | None:
  """Returns the font of a file, `size` pixels high; None if it is unusable."""
  try:
    # The basic layout is everywhere; the better one depends on a library.
    basic = ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size, layout_engine=basic)
  except (OSError, ImportError, ValueError):
    return None


def _pillow_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  try:
    return ImageFont.load_default(size)
  except (OSError, ImportError):  # Pillow without FreeType
    return ImageFont.load_default()


@functools.lru_cache(maxsize=64)
def characters(path: str) -> frozenset[int]:
  """Code points that the first face of a font file holds; empty if unusable."""
  # Imported here: it takes a tenth of a second, and only drawing needs it.
  from fontTools import ttLib

  logging.getLogger('fontTools').setLevel(logging.ERROR)
  try:
    with ttLib.TTFont(path, fontNumber=0, lazy=True) as font:
      return frozenset(font.getBestCmap() or ())
  except Exception:  # Damaged fonts raise whatever they run into.
    return frozenset()
