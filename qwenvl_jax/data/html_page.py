"""HTML pages in one file without external parts: a frame, tables, pictures."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #d8dde6;
         text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; }
small { color: #667; }
"""


def page(title: str, body: str, style: str = '') -> str:
  """Returns a page: title as text, body as HTML, and CSS of its own."""
  title = html.escape(title)
  whole = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    f'<title>{title}</title><style>{_STYLE}{style}</style>'
    f'<body><h1>{title}</h1>{body}</body></html>\n'
  )
  # Strangers' text may hold halves of surrogate pairs.
  return whole.encode('utf-8', 'replace').decode()


def table(
  head: Sequence[str], rows: Iterable[Sequence[str] | tuple[str, Sequence[str]]]
) -> str:
  """Returns a table of cells that are HTML.

  Args:
    head: titles of the columns; none for a table without them.
    rows: cells of each row, or a tuple of its CSS class and its cells.
  """
  lines = [f'<tr>{"".join(f"<th>{x}</th>" for x in head)}</tr>'] if head else []
  for row in rows:
    kind, cells = row if isinstance(row, tuple) else ('', row)
    cells = ''.join(f'<td>{x}</td>' for x in cells)
    lines.append(f'<tr class="{kind}">{cells}</tr>')
  return f'<table>{"".join(lines)}</table>'


def picture(found: Image.Image | bytes, kind: str = 'png') -> str:
  """Returns a picture, or the bytes of one of a kind, as an element."""
  if isinstance(found, Image.Image):
    encoded = io.BytesIO()
    found.save(encoded, kind)
    found = encoded.getvalue()
  data = base64.b64encode(found).decode()
  return f'<img alt="" src="data:image/{kind};base64,{data}">'
