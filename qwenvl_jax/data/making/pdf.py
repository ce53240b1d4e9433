"""PDF pages: pictures of them and the lines of their text, by pdfium."""

import ctypes
import dataclasses
import math

from qwenvl_jax.data.making.page import (
  Line,
  Page,
  RefusedError,
  readable,
  upright,
)
from qwenvl_jax.errors import ConfigError, DataError

# Device units a pixel: pdfium gives whole ones.
_FINE = 64
# Gaps of so many letter heights part a line, as between columns or cells.
_GAP = 1.6
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
  """A page of a PDF.

  Args:
    source: path or contents.
    number: of the page, from 0.
    side: pixels of the longer side of the picture.

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


def _lines(page, size) -> list[Line]:
  """Lines of a page, in the order of the document."""
  lines, run, unknown, known = [], [], 0, 0
  for glyph in _glyphs(page, size):
    if glyph is None:  # A line ends.
      lines += _line(run)
      run = []
    elif glyph.text == '\ufffd' or '\ue000' <= glyph.text <= '\uf8ff':
      unknown += 1
    else:
      known += 1
      if run and _apart(run[-1], glyph):
        lines += _line(run)
        run = []
      run.append(glyph)
  lines += _line(run)
  if unknown > _MOST_UNKNOWN * (known + unknown):
    raise RefusedError('unknown_characters')
  inside = []
  for line in lines:
    (left, top), _, (right, bottom), _ = line.quad
    if left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1]:
      inside.append(line)
  return inside


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


def _apart(before: _Glyph, glyph: _Glyph) -> bool:
  """Whether a gap or a jump parts two characters that follow each other."""
  height = max(before.bottom - before.top, glyph.bottom - glyph.top, 1.0)
  if glyph.text.isspace() or before.text.isspace():
    return False
  back = glyph.right < before.left
  return back or glyph.left - before.right > _GAP * height


def _line(run: list[_Glyph]) -> list[Line]:
  """The line of a run; two or more where spaces are wide."""
  shown = [g for g in run if not g.text.isspace()]
  if not shown:
    return []
  parts, text, last = [[]], [''], None
  for glyph in run:
    if glyph.text.isspace():
      text[-1] += ' '
      continue
    height = max(glyph.bottom - glyph.top, 1.0)
    if last is not None and glyph.left - last.right > 2 * _GAP * height:
      parts.append([])
      text.append('')
    parts[-1].append(glyph)
    text[-1] += glyph.text
    last = glyph
  return [
    Line(
      readable(words),
      upright(
        min(g.left for g in part),
        min(g.top for g in part),
        max(g.right for g in part),
        max(g.bottom for g in part),
      ),
    )
    for part, words in zip(parts, text)
    if readable(words)
  ]
