"""PDF pages: pictures of them and the lines of their text, by pdfium."""

import ctypes
import dataclasses
import math

from qwenvl_jax.data.making.page import Page, RefusedError, readable, upright
from qwenvl_jax.data.records import Word
from qwenvl_jax.errors import ConfigError, DataError

# Device units a pixel: pdfium gives whole ones.
_FINE = 64
# Gaps of so many letter heights part a line, as between columns or cells; and
# gaps with a space in them.
_GAP, _WIDE_SPACE = 1.6, 3.2
# Radians that text may be turned by, as on pages scanned a little askew.
_ASKEW = 0.03
# Pages are refused if more of their letters have no meaning in Unicode.
_MOST_UNKNOWN = 0.01


@dataclasses.dataclass
class _Glyph:
  """A character and its box in pixels."""

  text: str
  left: float
  top: float
  right: float
  bottom: float


def pages_in(path: str) -> int:
  """The number of pages of a file.

  Raises:
    DataError: it cannot be opened.
  """
  with _opened(path) as document:
    return len(document)


def read(source: str | bytes, number: int, side: int) -> Page:
  """Page `number`, from 0, of a PDF (path or contents), `side` pixels long.

  Raises:
    DataError: the file cannot be opened.
    RefusedError: the page has no text (a scan), text that cannot be read
      out (fonts without Unicode) or that does not run from left to right.
  """
  import pypdfium2

  with _opened(source) as document:
    try:
      page = document[number]
      width, height = page.get_size()
      if not min(width, height) > 0:
        raise RefusedError('damaged_page')
      bitmap = page.render(scale=side / max(width, height))
      picture = bitmap.to_pil().convert('RGB')
      lines = _lines(page, picture.size)
    except pypdfium2.PdfiumError as error:
      raise RefusedError('damaged_page') from error
  if not lines:
    raise RefusedError('no_text')
  return Page(picture, tuple(lines))


def _opened(source):
  try:
    import pypdfium2
  except ImportError as error:
    raise ConfigError(
      'PDF pages need the package pypdfium2; run '
      "`pip install 'qwenvl_jax[ocr]'`"
    ) from error
  try:
    return pypdfium2.PdfDocument(source)
  except (pypdfium2.PdfiumError, OSError) as error:
    name = source if isinstance(source, str) else 'what was given'
    raise DataError(
      f'{name} is no PDF that can be opened ({error}); take it away'
    ) from error


def _lines(page, size) -> list[Word]:
  """Lines of a page, in the order of the document."""
  runs, unknown, known = [[]], 0, 0
  for glyph in _glyphs(page, size):
    if glyph is None:  # A line ends.
      runs.append([])
    elif glyph.text == '\ufffd' or '\ue000' <= glyph.text <= '\uf8ff':
      unknown += 1
    else:
      known += 1
      if _apart(runs[-1], glyph):
        runs.append([])
      runs[-1].append(glyph)
  if unknown > _MOST_UNKNOWN * (known + unknown):
    raise RefusedError('unknown_characters')
  lines = []
  for run in runs:
    text = readable(''.join(x.text for x in run))
    shown = [x for x in run if not x.text.isspace()]
    if not text or not shown:
      continue
    left, top = min(x.left for x in shown), min(x.top for x in shown)
    right, bottom = max(x.right for x in shown), max(x.bottom for x in shown)
    if left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]:
      lines.append(Word(text, upright(left, top, right, bottom)))
  return lines


def _glyphs(page, size):
  """Characters in order, None where a line ends."""
  import pypdfium2.raw as pdfium

  text = page.get_textpage()
  shown = math.radians(page.get_rotation())
  left, right, bottom, top = (ctypes.c_double() for _ in range(4))
  for i in range(text.count_chars()):
    sign = chr(pdfium.FPDFText_GetUnicode(text, i))
    if sign in '\r\n':
      yield None
      continue
    # Counter-clockwise on the paper, which is shown turned clockwise.
    angle = pdfium.FPDFText_GetCharAngle(text, i) - shown
    if abs(math.remainder(angle, math.tau)) > _ASKEW and not sign.isspace():
      raise RefusedError('turned_text')
    if not pdfium.FPDFText_GetCharBox(text, i, left, right, bottom, top):
      continue
    x1, y1 = _to_pixels(page, size, left.value, top.value)
    x2, y2 = _to_pixels(page, size, right.value, bottom.value)
    yield _Glyph(sign, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def _to_pixels(page, size, x, y) -> tuple[float, float]:
  """By pdfium, which knows of turned pages and crop boxes."""
  import pypdfium2.raw as pdfium

  device_x, device_y = ctypes.c_int(), ctypes.c_int()
  pdfium.FPDF_PageToDevice(
    page, 0, 0, size[0] * _FINE, size[1] * _FINE, 0, x, y, device_x, device_y
  )
  return device_x.value / _FINE, device_y.value / _FINE


def _apart(run: list[_Glyph], glyph: _Glyph) -> bool:
  """Whether a gap or a jump parts a character from those before it."""
  before = next((x for x in reversed(run) if not x.text.isspace()), None)
  if glyph.text.isspace() or before is None:
    return False
  height = max(glyph.bottom - glyph.top, 1.0)
  gap = glyph.left - before.right
  if run[-1] is not before:
    return gap > _WIDE_SPACE * height
  height = max(height, before.bottom - before.top)
  return glyph.right < before.left or gap > _GAP * height
