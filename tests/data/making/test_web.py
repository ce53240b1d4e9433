import http.server
import threading

import numpy as np
import pytest

from qwenvl_jax.data.making import web
from qwenvl_jax.errors import ConfigError

pytest.importorskip('playwright')


@pytest.fixture(scope='module')
def browser():
  try:
    made = web.Browser()
  except ConfigError as error:
    pytest.skip(f'no browser: {error}')
  yield made
  made.close()


def show(browser, markup, size=(400, 300)):
  return browser.show(f'<!doctype html>{markup}', size)


def test_lines_and_their_boxes(browser):
  page = show(
    browser,
    '<body style="font: 20px sans-serif; margin: 30px">'
    '<p style="width: 150px">one two three four five six seven</p>'
    '<p style="text-transform: uppercase">loud</p>',
  )
  texts = [x.word for x in page.lines]
  assert texts[-1] == 'LOUD'
  assert ' '.join(texts[:-1]) == 'one two three four five six seven'
  assert len(texts) >= 3
  dark = np.asarray(page.picture.convert('L')) < 128
  for line in page.lines:
    (left, top), _, (right, bottom), _ = (
      (round(x), round(y)) for x, y in line.quad
    )
    inside = dark[top:bottom, left:right]
    assert inside.any()
    dark[top:bottom, left:right] = False
  assert not dark.any()


def test_what_cannot_be_seen_is_not_read(browser):
  page = show(
    browser,
    '<p>seen</p><p style="display: none">gone</p>'
    '<p style="visibility: hidden">gone</p><p style="opacity: 0">gone</p>'
    '<p style="position: absolute; left: -900px">gone</p>'
    '<div style="position: relative"><p>covered</p><div style="position: '
    'absolute; inset: 0; background: white"></div></div>'
    '<script>document.body.append("made by a script")</script>',
  )
  assert [x.word for x in page.lines] == ['seen']


def test_the_lower_edge_goes_through_no_line(browser):
  lines = ''.join(f'<div>line {i}</div>' for i in range(60))
  page = show(browser, f'<body style="font: 21px/33px serif">{lines}')
  shown = [x.word for x in page.lines]
  assert shown == [f'line {i}' for i in range(len(shown))] and len(shown) > 4
  last = max(y for _, y in page.lines[-1].quad)
  assert last <= page.picture.height <= 300
  # Nothing is seen below the last line.
  below = np.asarray(page.picture.convert('L'))[int(last) + 1 :]
  assert (below > 128).all()


def test_nothing_is_fetched(browser):
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      self.send_error(404)

  with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    page = show(
      browser,
      f'<link rel=stylesheet href="{address}/a.css"><img src="{address}/b.png">'
      '<img src="file:///etc/hostname"><p>text</p>',
    )
    server.shutdown()
  assert [x.word for x in page.lines] == ['text'] and not asked


def test_a_page_without_text(browser):
  assert show(browser, '<hr>') is None


def test_a_browser_that_is_not_there(monkeypatch):
  with pytest.raises(ConfigError, match='--chromium'):
    web.find_chromium('/nowhere/chromium')
  monkeypatch.delenv('CHROMIUM', raising=False)
  monkeypatch.setattr(web, '_NAMES', ())
  with pytest.raises(ConfigError, match='apt-get install chromium'):
    web.find_chromium()
