"""Bytes of a picture that a request names: `data:`, `file:`, `http(s):`.

Only what the operator allowed is read. A URL is parsed once; the host's
addresses are looked up once, none of them may be of a private network, and one
of these addresses is what is dialled: a name cannot mean something else the
second time. Every redirect is checked like the first URL.
"""

import base64
import binascii
import http.client
import ipaddress
import os
import pathlib
import re
import socket
import ssl
import stat
import threading
import time
import urllib.parse

from qwenvl_jax.serve.limits import ApiError, Limits

_DATA = re.compile(r'data:([\w.+/-]*)((?:;[\w.+=-]*)*),', re.ASCII)
_HOST = re.compile(r'[A-Za-z0-9.-]{1,253}', re.ASCII)
# How an operator allows one.
DOMAIN = re.compile(_HOST.pattern + r'(:\d{1,5})?', re.ASCII)
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_HOPS = 3
_CHUNK = 65536
# IPv6 addresses that stand for IPv4 ones.
_EMBEDDING = [
  ipaddress.ip_network(net) for net in ('64:ff9b::/96', '2002::/16', '::/96')
]


def fetch(url: str, limits: Limits, name: str) -> bytes:
  """Reads an encoded picture.

  Raises:
    ApiError: another kind of URL, or one that is not allowed or not readable.
  """
  scheme = url[:6].partition(':')[0].lower()
  if scheme == 'data':
    return _data(url, limits, name)
  if scheme == 'file':
    return _file(url, limits, name)
  if scheme in ('http', 'https'):
    return _http(url, limits, name)
  raise _error(name, 'is neither a data: URL nor one of file: or http(s):')


def _error(name: str, what: str) -> ApiError:
  return ApiError(f'{name} {what}', 'messages')


def _too_large(name: str, limits: Limits) -> ApiError:
  return _error(name, f'has more than {limits.image_bytes:,} bytes')


def _data(url: str, limits: Limits, name: str) -> bytes:
  if len(url) > 4 * limits.image_bytes // 3 + 1024:
    raise _too_large(name, limits)
  found = _DATA.match(url)
  if not found or ';base64' not in found[2].lower():
    raise _error(name, 'is no data URL of the form data:image/png;base64,..')
  try:
    data = base64.b64decode(url[found.end() :].encode('ascii'), validate=True)
  except (UnicodeEncodeError, binascii.Error) as error:
    raise _error(name, 'is not base64 after the comma') from error
  if len(data) > limits.image_bytes:
    raise _too_large(name, limits)
  return data


def _file(url: str, limits: Limits, name: str) -> bytes:
  folder = limits.media_folder
  if folder is None:
    raise _error(name, 'is a file: URL, which this server does not read')
  refused = _error(name, "is no picture in the server's media folder")
  try:
    split = urllib.parse.urlsplit(url)
    if split.netloc or split.query or split.fragment:
      raise refused
    path = urllib.parse.unquote(split.path, errors='strict')
    root = folder.resolve(strict=True)
    # Relative to the folder, or absolute within it; links are followed first.
    inside = pathlib.Path(path)
    if not inside.is_relative_to(root):
      inside = root / path.lstrip('/')
    real = inside.resolve(strict=True)
    if not real.is_relative_to(root):
      raise refused
    # Not blocking, so that a named pipe does not hang the reader.
    with open(os.open(real, os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:
      if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise refused
      data = file.read(limits.image_bytes + 1)
  except (OSError, ValueError, UnicodeError) as error:
    raise refused from error
  if len(data) > limits.image_bytes:
    raise _too_large(name, limits)
  return data


def _http(url: str, limits: Limits, name: str) -> bytes:
  if not limits.media_domains:
    raise _error(
      name,
      'is an http(s) URL, which this server does not fetch; send the picture '
      'as a data: URL',
    )
  ends = time.monotonic() + limits.fetch_seconds
  for _ in range(_MAX_HOPS + 1):
    scheme, host, port, path = _target(url, limits, name)
    try:
      answer = _ask(scheme, host, port, path, limits, ends)
    except (OSError, http.client.HTTPException, ValueError) as error:
      raise _error(name, 'could not be fetched') from error
    if answer is None:
      raise _too_large(name, limits)
    status, location, data = answer
    if status == 200:
      return data
    if status not in _REDIRECTS or not location:
      raise _error(name, f'could not be fetched: its host answers {status}')
    try:
      url = urllib.parse.urljoin(f'{scheme}://{host}:{port}{path}', location)
    except ValueError as error:
      raise _error(name, 'could not be fetched') from error
  raise _error(name, 'is redirected too often')


def _target(url: str, limits: Limits, name: str):
  """(scheme, host, port, path with query) of a URL that is allowed."""
  refused = _error(name, 'is at a host that this server does not fetch from')
  try:
    split = urllib.parse.urlsplit(url)
    default = {'http': 80, 'https': 443}[split.scheme]
    port = split.port or default
    host = split.hostname or ''
  except (ValueError, KeyError) as error:
    raise refused from error
  plain = url.isascii() and url.isprintable() and not set(' \\') & set(url)
  if not plain or '@' in split.netloc or not _HOST.fullmatch(host):
    raise refused
  domain = host if port == default else f'{host}:{port}'
  if domain not in {x.lower() for x in limits.media_domains}:
    raise refused
  path = split.path or '/'
  return (
    split.scheme,
    host,
    port,
    path + (f'?{split.query}' * bool(split.query)),
  )


def is_public(address: str) -> bool:
  """Whether an IP address is one of the internet, not of a private network."""
  ip = ipaddress.ip_address(address.partition('%')[0])
  if ip.version == 6:
    if ip.ipv4_mapped is not None:
      return is_public(str(ip.ipv4_mapped))
    if any(ip in net for net in _EMBEDDING):
      return False
  return ip.is_global and not ip.is_multicast


def addresses(host: str, port: int) -> list[str]:
  """All addresses of a host.

  Raises:
    OSError: there is no such host.
  """
  found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  return [address[0] for *_, address in found]


def _ask(scheme, host, port, path, limits, ends):
  """(status, location, body) of one request; None if the body is too large."""
  found = addresses(host, port)
  if not found or not all(map(is_public, found)):
    raise OSError('not a public address')
  plain = socket.create_connection((found[0], port), timeout=_left(ends))
  # Reads have time-outs of their own, which a byte now and then would renew.
  timer = threading.Timer(
    _left(ends), lambda: socket.socket.shutdown(plain, socket.SHUT_RDWR)
  )
  timer.start()
  try:
    if scheme == 'https':
      context = ssl.create_default_context()
      plain = context.wrap_socket(plain, server_hostname=host)
    connection = http.client.HTTPConnection(host, port)
    connection.sock = plain
    plain.settimeout(_left(ends))
    connection.request('GET', path, headers={'Accept': 'image/*'})
    answer = connection.getresponse()
    data = bytearray()
    if answer.status == 200:
      while True:
        plain.settimeout(_left(ends))
        chunk = answer.read1(_CHUNK)
        if not chunk:
          break
        data += chunk
        if len(data) > limits.image_bytes:
          return None
    _left(ends)  # What was cut off then is not the picture.
    return answer.status, answer.getheader('Location'), bytes(data)
  finally:
    timer.cancel()
    plain.close()


def _left(ends: float) -> float:
  left = ends - time.monotonic()
  if left <= 0:
    raise TimeoutError('the time to fetch a picture is over')
  return left
