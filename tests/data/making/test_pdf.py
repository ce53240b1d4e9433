import io

import numpy as np
import pytest

from qwenvl_jax.data.making import pdf
from qwenvl_jax.errors import DataError
from qwenvl_jax.text import fonts

fpdf = pytest.importorskip('fpdf')
pypdfium2 = pytest.importorskip('pypdfium2')


def document(width=400, height=300):
  made = fpdf.FPDF(unit='pt', format=(width, height))
  made.set_auto_page_break(False)
  made.add_page()
  made.add_font('text', fname=str(fonts.PACKAGED_FONT))
  made.set_font('text', size=20)
  return made


def ink(page, threshold=128):
  return np.asarray(page.picture.convert('L')) < threshold


def test_lines_and_their_boxes():
  made = document()
  made.text(50, 60, 'First line')
  made.text(50, 100, '第二行')
  # Two cells of a table on one height.
  made.text(50, 140, 'left')
  made.text(300, 140, 'right')
  page = pdf.read(bytes(made.output()), 0, 800)
  assert page.picture.size == (800, 600)
  assert [x.word for x in page.lines] == [
    'First line',
    '第二行',
    'left',
    'right',
  ]
  dark = ink(page)
  for line in page.lines:
    (left, top), _, (right, bottom), _ = line.quad
    # All ink near the line is in its box, and the box is tight.
    near = np.zeros_like(dark)
    near[int(top) - 12 : int(bottom) + 12, int(left) - 12 : int(right) + 12] = 1
    ys, xs = np.nonzero(dark & near)
    assert abs(xs.min() - left) < 4 and abs(xs.max() + 1 - right) < 4
    assert abs(ys.min() - top) < 4 and abs(ys.max() + 1 - bottom) < 4


def turned(made) -> bytes:
  """The document with its page shown upside down."""
  opened = pypdfium2.PdfDocument(bytes(made.output()))
  opened[0].set_rotation(180)
  out = io.BytesIO()
  opened.save(out)
  return out.getvalue()


def test_a_turned_page_is_read_as_it_is_shown():
  made = document()
  with made.rotation(180, 100, 100):
    made.text(40, 100, 'upright again')
  page = pdf.read(turned(made), 0, 800)
  (line,) = page.lines
  assert line.word == 'upright again'
  ys, xs = np.nonzero(ink(page))
  (left, top), _, (right, bottom), _ = line.quad
  assert abs(xs.min() - left) < 4 and abs(xs.max() + 1 - right) < 4
  assert abs(ys.min() - top) < 4 and abs(ys.max() + 1 - bottom) < 4
  made = document()
  made.text(50, 60, 'upside down')
  with pytest.raises(pdf.RefusedError, match='turned_text'):
    pdf.read(turned(made), 0, 800)


def test_pages_that_are_refused():
  with pytest.raises(pdf.RefusedError, match='no_text'):
    pdf.read(bytes(document().output()), 0, 400)
  made = document()
  with made.rotation(30, 100, 100):
    made.text(100, 100, 'askew')
  with pytest.raises(pdf.RefusedError, match='turned_text'):
    pdf.read(bytes(made.output()), 0, 400)


def test_what_is_no_pdf(tmp_path):
  file = tmp_path / 'a.pdf'
  file.write_bytes(b'%PDF-1.7 nothing more')
  with pytest.raises(DataError, match=r'a\.pdf is no PDF'):
    pdf.pages_in(str(file))
