"""Fonts that can show a text: the system's, a packaged one, Pillow's own.

Which characters a font holds is read from its `cmap` table, because Pillow
draws a box for a missing glyph without saying so.
"""

import functools
import pathlib
import struct
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
      font = _open(path, size)
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


@functools.lru_cache(maxsize=64)
def _open(path: str, size: int) -> ImageFont.FreeTypeFont | None:
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
  try:
    with open(path, 'rb') as file:
      return frozenset(_read_cmap(file))
  except (OSError, struct.error, StopIteration, ValueError, IndexError):
    return frozenset()


def _read_cmap(file) -> set[int]:
  """Parses the OpenType `cmap` table, formats 4 and 12."""
  start = 0
  if file.read(4) == b'ttcf':
    file.seek(12)
    (start,) = struct.unpack('>I', file.read(4))
  file.seek(start + 4)
  (tables,) = struct.unpack('>H', file.read(2))
  file.seek(start + 12)
  records = (struct.unpack('>4sIII', file.read(16)) for _ in range(tables))
  _, _, offset, length = next(r for r in records if r[0] == b'cmap')
  file.seek(offset)
  table = file.read(length)
  (subtables,) = struct.unpack_from('>H', table, 2)
  held = set()
  for i in range(subtables):
    platform, encoding, at = struct.unpack_from('>HHI', table, 4 + 8 * i)
    (layout,) = struct.unpack_from('>H', table, at)
    # Unicode subtables only: the others count in other character sets.
    unicode = platform == 0 or (platform == 3 and encoding in (1, 10))
    if unicode and layout == 12:
      (groups,) = struct.unpack_from('>I', table, at + 12)
      for first, last, _ in struct.iter_unpack(
        '>III', table[at + 16 : at + 16 + 12 * groups]
      ):
        held.update(range(first, min(last, 0x10FFFF) + 1))
    elif unicode and layout == 4:
      held.update(_read_segments(table, at))
  return held


def _read_segments(table: bytes, at: int) -> set[int]:
  """Characters of a format 4 subtable that map to a glyph."""
  (doubled,) = struct.unpack_from('>H', table, at + 6)
  count = doubled // 2

  def column(index: int, kind: str) -> tuple[int, ...]:
    # A reserved word stands between the first column and the others.
    offset = at + 14 + index * doubled + (2 if index else 0)
    return struct.unpack_from(f'>{count}{kind}', table, offset)

  held = set()
  rows = zip(
    column(0, 'H'), column(1, 'H'), column(2, 'h'), column(3, 'H'), strict=True
  )
  for i, (last, first, delta, shift) in enumerate(rows):
    if last == 0xFFFF:
      last -= 1  # the obligatory end marker, no character
    for code in range(first, last + 1):
      glyph = code
      if shift:
        # `shift` counts bytes from its own place in the fourth column.
        place = at + 16 + 3 * doubled + 2 * i + shift + 2 * (code - first)
        (glyph,) = struct.unpack_from('>H', table, place)
      absent = shift and glyph == 0
      if not absent and (glyph + delta) & 0xFFFF:
        held.add(code)
  return held
