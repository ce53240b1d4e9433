"""HTML pages, rendered in headless Chromium, with the lines of their text.

Pages that a person has, or pages composed here. Scripts do not run and nothing
is fetched: a page is shown with what it holds itself.
"""

import base64
import dataclasses
import functools
import html
import io
import os
import pathlib
import random
import shutil
from collections.abc import Mapping, Sequence

from PIL import Image

from qwenvl_jax.data.making import backgrounds, documents
from qwenvl_jax.data.making.page import Line, Page, readable, upright
from qwenvl_jax.data.making.typefaces import Typeface, of_language
from qwenvl_jax.data.making.words import Words
from qwenvl_jax.errors import ConfigError

# Where distributions put it; `--chromium` and CHROMIUM come first.
_NAMES = (
  'chromium',
  'chromium-browser',
  'google-chrome-stable',
  'google-chrome',
)
_ARGUMENTS = ('--no-sandbox', '--disable-gpu', '--font-render-hinting=none')

_LARGEST_FONT = 2 << 20

# Lines of text that can be seen: one entry per line box of every text node.
_COLLECT = """() => {
  const lines = [];
  const range = document.createRange();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const shown = {checkOpacity: true, checkVisibilityCSS: true,
                 opacityProperty: true, visibilityProperty: true};
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || !parent.checkVisibility(shown)) continue;
    if (parent.closest('script, style, noscript, svg, select, title')) continue;
    const style = getComputedStyle(parent);
    const change = {
      uppercase: x => x.toUpperCase(), lowercase: x => x.toLowerCase(),
      capitalize: x => x.replace(/(^|\\s)\\S/g, y => y.toUpperCase()),
    }[style.textTransform] || (x => x);
    let line = null;
    let at = 0;
    for (const sign of node.data) {
      range.setStart(node, at);
      range.setEnd(node, at + sign.length);
      at += sign.length;
      const box = range.getClientRects()[0];
      if (!box || !box.width || !box.height) {
        if (line) line.text += ' ';
        continue;
      }
      const middle = (box.top + box.bottom) / 2;
      if (!line || middle > line.bottom || middle < line.top
          || box.left < line.last - 1) {
        line = {text: '', left: 1e9, top: 1e9, right: -1e9, bottom: -1e9,
                change};
        lines.push(line);
      }
      line.text += sign;
      line.last = box.left;
      if (!sign.trim()) continue;
      line.left = Math.min(line.left, box.left);
      line.right = Math.max(line.right, box.right);
      line.top = Math.min(line.top, box.top);
      line.bottom = Math.max(line.bottom, box.bottom);
    }
    for (const line of lines) line.node ??= parent;
  }
  const found = [];
  for (const line of lines) {
    const x = (line.left + line.right) / 2, y = (line.top + line.bottom) / 2;
    const top = document.elementFromPoint(x, y);
    // Covered by something else, or cut off by a parent.
    const cut = y >= innerHeight && line.top < innerHeight;
    const seen = top && (top.contains(line.node) || line.node.contains(top));
    if (!cut && !seen) continue;
    found.push([line.change(line.text),
                line.left, line.top, line.right, line.bottom]);
  }
  return found;
}"""


def find_chromium(path: str | None = None) -> str:
  """The browser's program.

  Args:
    path: where a person says it is; else the variable CHROMIUM, else the
      places where it usually is.

  Raises:
    ConfigError: it is not there.
  """
  asked = path or os.environ.get('CHROMIUM')
  if asked:
    if shutil.which(asked):
      return shutil.which(asked)
    raise ConfigError(f'{asked} is no program; name Chromium with --chromium')
  for name in _NAMES:
    if shutil.which(name):
      return shutil.which(name)
  raise ConfigError(
    'HTML pages need Chromium and there is none; install it (Debian, Ubuntu: '
    'apt-get install chromium) or name it with --chromium'
  )


class Browser:
  """A headless Chromium that shows pages; close it after use."""

  def __init__(self, chromium: str | None = None):
    program = find_chromium(chromium)
    try:
      from playwright import sync_api
    except ImportError as error:
      raise ConfigError(
        'HTML pages need the package playwright; run '
        "`pip install 'qwenvl_jax[ocr]'`"
      ) from error
    self._error = sync_api.Error
    self._playwright = sync_api.sync_playwright().start()
    try:
      self._browser = self._playwright.chromium.launch(
        executable_path=program, args=list(_ARGUMENTS)
      )
    except sync_api.Error as error:
      self._playwright.stop()
      reason = str(error).strip().splitlines()[0]
      raise ConfigError(f'{program} does not start: {reason}') from error

  def close(self) -> None:
    self._browser.close()
    self._playwright.stop()

  def show(self, document: 'Document', size: tuple[int, int]) -> Page | None:
    """What fits the window of a page; None if it shows no text.

    Args:
      document: the page.
      size: width and height of the window, in pixels.
    """
    context = self._browser.new_context(
      viewport={'width': size[0], 'height': size[1]},
      offline=True,
      java_script_enabled=False,
      service_workers='block',
    )
    try:
      # Nothing a page names is fetched, from no server and no disk.
      context.route('**/*', functools.partial(_answer, document.files))
      page = context.new_page()
      page.set_content(document.markup, wait_until='load', timeout=20_000)
      page.evaluate('document.fonts.ready.then(() => true)')
      found = page.evaluate(_COLLECT)
      shot = page.screenshot(animations='disabled', caret='hide')
    except self._error:
      return None
    finally:
      context.close()
    picture = Image.open(io.BytesIO(shot)).convert('RGB')
    return _cut(picture, [(readable(text), *box) for text, *box in found])


# The least share of a window's height that a page may be cut to.
_LEAST_HEIGHT = 0.5


def _cut(picture, found) -> Page | None:
  """A page whose lower edge goes through no line, if that can be."""
  bottom = picture.height
  while crossed := [y for _, _, y, _, end in found if y < bottom < end]:
    bottom = int(min(crossed))
  if bottom >= _LEAST_HEIGHT * picture.height:
    picture = picture.crop((0, 0, picture.width, bottom))
  lines = tuple(
    Line(text, upright(x1, y1, x2, y2))
    for text, x1, y1, x2, y2 in found
    if text
    and x1 >= 0
    and y1 >= 0
    and x2 <= picture.width
    and y2 <= picture.height
    and x2 - x1 >= 2
    and y2 - y1 >= 4
  )
  return Page(picture, lines) if lines else None


@dataclasses.dataclass(frozen=True)
class Document:
  """A page as HTML.

  Attributes:
    markup: the page.
    files: addresses in it -> local files that stand for them.
  """

  markup: str
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _answer(files, route):
  path = files.get(route.request.url)
  if path is None:
    route.abort()
  else:
    route.fulfill(path=path, headers={'Access-Control-Allow-Origin': '*'})


def read_file(path: pathlib.Path) -> Document:
  """A page of a person; bytes that are no UTF-8 become U+FFFD."""
  return Document(path.read_text(encoding='utf-8', errors='replace'))


def compose(
  rng: random.Random,
  words: Words,
  faces: Sequence[Typeface],
  language: str,
) -> Document:
  """A page: a header, one or two columns, all kinds of parts."""
  chosen = [rng.choice(of_language(faces, language)) for _ in range(2)]
  held = chosen[0].characters & chosen[1].characters
  files, styles = {}, ''
  for number, face in enumerate(chosen):
    address = f'https://fonts.invalid/{number}'
    family, style = face.font(12).getname()
    sources = [f'local("{family} {style}")', f'local("{family}")']
    # Larger files and collections do not go through in time; the browser has
    # those that the system has.
    path = pathlib.Path(face.path)
    if path.suffix != '.ttc' and path.stat().st_size <= _LARGEST_FONT:
      files[address] = face.path
      sources = [f'url({address})']
    styles += f'@font-face {{ font-family: f{number}; '
    styles += f'src: {", ".join(sources)}; }}'
  dark = rng.random() < 0.15
  ground = rng.randint(10, 45) if dark else rng.randint(235, 255)
  ink = rng.randint(200, 245) if dark else rng.randint(0, 60)
  accent = f'hsl({rng.randint(0, 359)} 60% {70 if dark else 32}%)'
  size = rng.uniform(13, 21)
  columns = rng.choice((1, 1, 2))
  styles += (
    f'body {{ margin: 0; background: rgb({ground},{ground},{ground}); '
    f'color: rgb({ink},{ink},{ink}); '
    f'font: {size:.1f}px/{rng.uniform(1.3, 1.7):.2f} f0, sans-serif; }}'
    'h1, h2 { font-family: f1, sans-serif; font-weight: normal; '
    f'line-height: 1.2; color: {accent}; }}'
    f'main {{ columns: {columns}; padding: {rng.randint(14, 48)}px; '
    f'text-align: {rng.choice(("left", "left", "justify"))}; }}'
    f'nav {{ background: {accent}; color: rgb({ground},{ground},{ground}); '
    f'padding: .6em 1em; }} nav span {{ margin-right: 2em; }}'
    'h1, h2, img, table { break-inside: avoid; } img { width: 100%; }'
    'table { border-collapse: collapse; width: 100%; }'
    'td { border: 1px solid #8888; padding: .2em .5em; }'
  )
  menu = ''.join(
    f'<span>{html.escape(x)}</span>'
    for x in documents.phrases(rng, words, language, held, rng.randint(3, 6))
  )
  parts = documents.compose(rng, words, language, held)
  body = ''.join(_part(rng, part) for part in parts)
  markup = (
    f'<!doctype html><html lang="{language}"><meta charset="utf-8">'
    f'<style>{styles}</style><nav>{menu}</nav><main>{body}</main></html>'
  )
  return Document(markup, files)


def _part(rng, part: documents.Part) -> str:
  texts = [html.escape(x) for x in part.texts]
  if part.kind == 'title':
    return f'<h1>{texts[0]}</h1>'
  if part.kind == 'heading':
    return f'<h2>{texts[0]}</h2>'
  if part.kind == 'paragraph':
    return f'<p>{texts[0]}</p>'
  if part.kind == 'list':
    kind = rng.choice(('ul', 'ol'))
    return f'<{kind}>{"".join(f"<li>{x}</li>" for x in texts)}</{kind}>'
  if part.kind == 'table':
    rows = [
      texts[i : i + part.columns] for i in range(0, len(texts), part.columns)
    ]
    cells = (f'<tr>{"".join(f"<td>{x}</td>" for x in r)}</tr>' for r in rows)
    return f'<table>{"".join(cells)}</table>'
  picture = backgrounds.compose(rng, (320, rng.randint(90, 200)))
  encoded = io.BytesIO()
  picture.save(encoded, 'JPEG', quality=85)
  data = base64.b64encode(encoded.getvalue()).decode()
  return f'<img alt="" src="data:image/jpeg;base64,{data}">'
