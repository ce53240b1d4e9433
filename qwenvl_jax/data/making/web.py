"""HTML pages, rendered in headless Chromium, with the lines of their text.

Scripts do not run and nothing is fetched: a page is shown with what it holds
itself.
"""

import io
import os
import shutil

from PIL import Image

from qwenvl_jax.data.making.page import Page, readable, upright
from qwenvl_jax.data.records import Word
from qwenvl_jax.errors import ConfigError

# Where distributions put it; `--chromium` and CHROMIUM come first.
_NAMES = (
  'chromium',
  'chromium-browser',
  'google-chrome-stable',
  'google-chrome',
)
_ARGUMENTS = ('--no-sandbox', '--disable-gpu', '--font-render-hinting=none')

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
  """The browser's program: `path`, else $CHROMIUM, else where it usually is.

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

  def show(self, markup: str, size: tuple[int, int]) -> Page | None:
    """What fits a window of so many pixels of HTML; None if it has no text."""
    context = self._browser.new_context(
      viewport={'width': size[0], 'height': size[1]},
      offline=True,
      java_script_enabled=False,
      service_workers='block',
    )
    try:
      # Nothing a page names is fetched, from no server and no disk.
      context.route('**/*', lambda route: route.abort())
      page = context.new_page()
      page.set_content(markup, wait_until='load', timeout=20_000)
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
    Word(text, upright(x1, y1, x2, y2))
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
