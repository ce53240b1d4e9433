import base64
import contextlib
import http.server
import os
import socket
import threading

import pytest

from qwenvl_jax.serve import fetch as fetching
from qwenvl_jax.serve.fetch import fetch, is_public
from qwenvl_jax.serve.limits import ApiError, Limits

PRIVATE = (
  *('127.0.0.1', '10.0.0.1', '172.16.0.1', '192.168.1.1', '169.254.169.254'),
  *('0.0.0.0', '100.64.0.1', '224.0.0.1', '255.255.255.255', '192.0.0.1'),
  *('::1', '::', 'fe80::1', 'fe80::1%eth0', 'fc00::1', 'ff02::1'),
  *('::ffff:127.0.0.1', '::ffff:10.0.0.1', '64:ff9b::7f00:1', '2002:7f00:1::'),
  '::127.0.0.1',
)


@pytest.mark.parametrize('address', PRIVATE)
def test_addresses_of_private_networks(address):
  assert not is_public(address)


@pytest.mark.parametrize('address', ['8.8.8.8', '2001:4860:4860::8888'])
def test_addresses_of_the_internet(address):
  assert is_public(address)


def refused(url, said, **limits):
  with pytest.raises(ApiError, match=said) as caught:
    fetch(url, Limits(**limits), 'picture 1')
  assert caught.value.status == 400


def test_data_urls():
  code = base64.b64encode(b'abc').decode()
  limits = Limits(image_bytes=8)
  for head in 'data:image/png;base64,', 'DATA:;BASE64,'.replace('DATA', 'data'):
    assert fetch(head + code, limits, 'picture 1') == b'abc'
  refused('data:image/png,abc', 'no data URL')
  refused('data:image/png;base64,a*b', 'not base64')
  refused('data:image/png;base64,ä', 'not base64')
  refused(
    f'data:;base64,{base64.b64encode(b"x" * 9).decode()}', 'more', image_bytes=8
  )
  refused('data:;base64,' + 'A' * 4000, 'more than 8', image_bytes=8)


@pytest.mark.parametrize(
  'url', ['ftp://h/x', '/etc/passwd', '', 'C:\\x', 'javascript:1', 'gopher://h']
)
def test_no_other_scheme(url):
  refused(url, 'neither')


def test_files_are_read_from_one_folder_only(tmp_path):
  folder = tmp_path / 'media'
  folder.mkdir()
  (folder / 'a b.png').write_bytes(b'abc')
  (tmp_path / 'secret').write_bytes(b'no')
  (folder / 'link').symlink_to(tmp_path / 'secret')
  os.mkfifo(folder / 'pipe')
  limits = Limits(media_folder=folder)
  for url in 'file:///a%20b.png', f'file://{folder}/a%20b.png':
    assert fetch(url, limits, 'picture 1') == b'abc'
  for name in (
    *('../secret', '%2e%2e/secret', 'link', 'pipe', '', 'gone', 'a%00b'),
    *('%ff', str(tmp_path / 'secret')),
  ):
    refused(f'file:///{name}', 'media folder', media_folder=folder)
  refused('file://host/a.png', 'media folder', media_folder=folder)
  refused('file:///a%20b.png', 'more', media_folder=folder, image_bytes=2)
  refused('file:///a.png', 'does not read')


def test_nothing_is_fetched_unless_allowed():
  refused('http://example.com/a.png', 'does not fetch')


@pytest.mark.parametrize(
  'url',
  [
    'http://other.com/a.png',
    'http://good.com.evil.com/a.png',
    'http://good.com@evil.com/a.png',
    'http://good.com:80@evil.com/a.png',
    'http://evil.com#@good.com/',
    'http://evil.com\\@good.com/',
    'http://good.com:81/a.png',
    'http://good.com:x/a.png',
    'http://[::1]/a.png',
    'http://127.0.0.1/a.png',
    'http://good.com /a.png',
    'http://good.com\n/a.png',
    'http://gооd.com/a.png',
    'http:///a.png',
    'https:good.com/a.png',
  ],
)
def test_only_hosts_on_the_list(url, monkeypatch):
  monkeypatch.setattr(fetching, 'addresses', lambda *_: pytest.fail('asked'))
  refused(url, 'does not fetch from', media_domains=('good.com',))


def test_a_name_of_the_own_network_is_not_dialled(monkeypatch):
  monkeypatch.setattr(
    fetching, 'addresses', lambda *_: ['8.8.8.8', '127.0.0.1']
  )
  monkeypatch.setattr(
    socket, 'create_connection', lambda *_, **__: pytest.fail('dialled')
  )
  refused('http://good.com/', 'could not', media_domains=('good.com',))


@pytest.fixture
def host(monkeypatch):
  """A host on this machine that is taken for one of the internet."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      status, headers, body = self.server.answers.get(self.path, (404, {}, b''))
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  server.answers = {}
  threading.Thread(target=server.serve_forever, daemon=True).start()
  looked_up = []

  def addresses(name, port):
    looked_up.append(name)
    return ['127.0.0.1']

  monkeypatch.setattr(fetching, 'addresses', addresses)
  monkeypatch.setattr(fetching, 'is_public', lambda address: True)
  server.looked_up = looked_up
  server.name = f'good.com:{server.server_address[1]}'
  yield server
  server.shutdown()
  server.server_close()


def test_what_is_allowed_is_fetched(host):
  url = f'http://{host.name}'
  host.answers['/a?b=c'] = 200, {}, b'abc'
  host.answers['/moved'] = 302, {'Location': '/a?b=c'}, b''
  host.answers['/loop'] = 302, {'Location': '/loop'}, b''
  host.answers['/away'] = 302, {'Location': 'http://evil.com/'}, b''
  host.answers['/file'] = 302, {'Location': 'file:///etc/passwd'}, b''
  host.answers['/large'] = 200, {}, b'x' * 100_000
  limits = {'media_domains': (host.name,), 'image_bytes': 1000}
  for path in '/a?b=c', '/moved':
    assert fetch(url + path, Limits(**limits), 'picture 1') == b'abc'
  # Each name is looked up once for each request that is sent.
  assert host.looked_up == ['good.com'] * 3
  refused(url + '/loop', 'redirected too often', **limits)
  refused(url + '/away', 'does not fetch from', **limits)
  refused(url + '/file', 'does not fetch from', **limits)
  refused(url + '/large', 'more than', **limits)
  refused(url + '/gone', 'answers 404', **limits)


def test_a_name_that_changes_is_not_dialled(host, monkeypatch):
  """A host that is public when first asked, and of the own network then."""
  host.answers['/moved'] = 302, {'Location': '/a'}, b''
  host.answers['/a'] = 200, {}, b'secret'
  found = ['8.8.8.8', '127.0.0.1']
  monkeypatch.setattr(fetching, 'addresses', lambda *_: [found.pop(0)])
  monkeypatch.setattr(fetching, 'is_public', is_public)
  dialled, dial = [], socket.create_connection

  def create_connection(address, **settings):
    dialled.append(address[0])
    return dial(('127.0.0.1', address[1]), **settings)

  monkeypatch.setattr(socket, 'create_connection', create_connection)
  url = f'http://{host.name}/moved'
  refused(url, 'could not be fetched', media_domains=(host.name,))
  assert dialled == ['8.8.8.8'] and not found


@pytest.mark.parametrize('head', [b'HT', b'HTTP/1.1 200 OK\r\n\r\nx'])
def test_a_host_that_dawdles_is_given_up(monkeypatch, head):
  monkeypatch.setattr(fetching, 'addresses', lambda *_: ['127.0.0.1'])
  monkeypatch.setattr(fetching, 'is_public', lambda address: True)
  over = threading.Event()

  def dawdle():
    connection, _ = listening.accept()
    with connection, contextlib.suppress(OSError):
      connection.sendall(head)
      while not over.wait(0.05):
        connection.sendall(b'x')

  with socket.create_server(('127.0.0.1', 0)) as listening:
    thread = threading.Thread(target=dawdle)
    thread.start()
    name = f'good.com:{listening.getsockname()[1]}'
    try:
      refused(
        *(f'http://{name}/', 'could not'),
        media_domains=(name,),
        fetch_seconds=0.5,
      )
    finally:
      over.set()
      thread.join()


def test_a_host_that_is_silent_is_given_up():
  with socket.socket() as listening, pytest.MonkeyPatch.context() as patch:
    listening.bind(('127.0.0.1', 0))
    listening.listen()
    patch.setattr(fetching, 'addresses', lambda *_: ['127.0.0.1'])
    patch.setattr(fetching, 'is_public', lambda address: True)
    name = f'good.com:{listening.getsockname()[1]}'
    refused(
      f'http://{name}/', 'could not', media_domains=(name,), fetch_seconds=0.2
    )
