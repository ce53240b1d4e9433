"""Plays Google Cloud Storage, as far as checkpoints and data need it.

What is served is the JSON API: objects appear whole and are replaced whole,
each write gives a new generation, nothing can be appended to or renamed. Who
is to use it sets the variables of `FakeStorage.environ`; then gcsfs,
google-cloud-storage, TensorStore and array_record come here.
"""

import base64
import dataclasses
import email
import hashlib
import itertools
import json
import pathlib
import re
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_DATE = '2026-01-01T00:00:00.000Z'


@dataclasses.dataclass
class Stored:
  data: bytes
  generation: int


@dataclasses.dataclass(frozen=True)
class Bucket:
  """A bucket, as tests look at it.

  Attributes:
    name: of the bucket.
    storage: whose it is.
  """

  name: str
  storage: 'FakeStorage'

  @property
  def url(self) -> str:
    return f'gs://{self.name}'

  @property
  def objects(self) -> dict[str, bytes]:
    with self.storage.lock:
      found = self.storage.buckets[self.name]
      return {name: found[name].data for name in sorted(found)}

  def put(self, name: str, data: bytes) -> None:
    self.storage.put(self.name, name, data)

  def put_folder(self, folder: pathlib.Path, name: str) -> None:
    for path in folder.rglob('*'):
      if path.is_file():
        where = path.relative_to(folder).as_posix()
        self.put(f'{name}/{where}', path.read_bytes())

  def flip_a_bit(self, name: str) -> None:
    data = bytearray(self.objects[name])
    data[len(data) // 2] ^= 1
    self.put(name, bytes(data))

  def delete(self, name: str) -> None:
    with self.storage.lock:
      del self.storage.buckets[self.name][name]


class Refused(Exception):
  """An answer that is not 200."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


class FakeStorage:
  """A server with buckets in memory.

  Attributes:
    buckets: name -> object name -> what is stored.
    requests: method and path of every request, for tests to count.
    before: called with method and bucket/name before each change of an object
      (PUT, DELETE) and each reading of one (GET); may raise `Refused`.
  """

  def __init__(self):
    self.buckets: dict[str, dict[str, Stored]] = {}
    self.requests: list[str] = []
    self.before: Callable[[str, str], None] | None = None
    self.lock = threading.Lock()
    self._generations = itertools.count(1)
    self._uploads: dict[str, dict] = {}
    handler = type('Handler', (_Handler,), {'storage': self})
    self._server = _Server(('127.0.0.1', 0), handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def new_bucket(self) -> Bucket:
    name = f'bucket-{len(self.buckets)}'
    self.buckets[name] = {}
    return Bucket(name, self)

  def environ(self) -> dict[str, str]:
    """Sends every client of a process here, and asks nobody for a password."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'CLOUD_STORAGE_EMULATOR_ENDPOINT': self.url,
      'GOOGLE_CLOUD_PROJECT': 'storage',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'of no account',
      # gcsfs asks for a bucket's kind over gRPC, which is not played here.
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  def put(self, bucket: str, name: str, data: bytes) -> dict:
    with self.lock:
      stored = Stored(data, next(self._generations))
      self.buckets[bucket][name] = stored
    return _resource(bucket, name, stored)

  def _ask(self, method: str, bucket: str, name: str) -> None:
    if self.before is not None:
      self.before(method, f'{bucket}/{name}')

  # One method a request; each answers (headers, body).

  def answer(self, method: str, target: str, headers, body: bytes):
    url = urlsplit(target)
    query = {k: v[0] for k, v in parse_qs(url.query, True).items()}
    path = url.path
    with self.lock:
      self.requests.append(f'{method} {target}')
    if path.startswith('/batch/'):
      return self._batch(headers, body)
    upload = path.startswith('/upload/')
    path = re.sub(r'^/(upload|download)', '', path).removeprefix('/storage/v1')
    match = re.fullmatch(r'/b/([^/]+)(/.*)?', path)
    if not match:
      raise Refused(404, f'not played: {method} {path}')
    bucket, rest = match[1], match[2] or ''
    if bucket not in self.buckets:
      raise Refused(404, f'The specified bucket does not exist: {bucket}')
    if upload:
      return self._upload(method, bucket, query, headers, body)
    if not rest:
      return _json({'kind': 'storage#bucket', 'id': bucket, 'name': bucket})
    if rest == '/o':
      return self._list(bucket, query)
    copy = re.fullmatch(r'/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)', rest)
    if copy and method == 'POST':
      return self._copy(bucket, unquote(copy[1]), copy[2], unquote(copy[3]))
    single = re.fullmatch(r'/o/([^/]+)', rest)
    if single and method in ('GET', 'DELETE'):
      name = unquote(single[1])
      do = self._get if method == 'GET' else self._delete
      return do(bucket, name, query, headers)
    raise Refused(404, f'not played: {method} {path}')

  def _find(self, bucket: str, name: str) -> Stored:
    with self.lock:
      stored = self.buckets[bucket].get(name)
    if stored is None:
      raise Refused(404, f'No such object: {bucket}/{name}')
    return stored

  def _check(self, bucket: str, name: str, query: dict) -> None:
    with self.lock:
      stored = self.buckets[bucket].get(name)
    generation = stored.generation if stored else 0
    if int(query.get('ifGenerationMatch', generation)) != generation:
      raise Refused(412, 'Precondition failed')
    if int(query.get('ifGenerationNotMatch', -1)) == generation:
      raise Refused(304, 'Not modified')

  def _list(self, bucket: str, query: dict):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    start, end = query.get('startOffset', ''), query.get('endOffset')
    after = query.get('pageToken', '')
    limit = int(query.get('maxResults', 1000))
    items, prefixes, token = [], [], None
    with self.lock:
      names = sorted(x for x in self.buckets[bucket] if x.startswith(prefix))
    for name in names:
      if name < start or (end and name >= end):
        continue
      entry = name
      if delimiter and delimiter in name[len(prefix) :]:
        cut = name.index(delimiter, len(prefix)) + len(delimiter)
        entry = name[:cut]
      if entry <= after or entry in prefixes:
        continue
      if len(items) + len(prefixes) == limit:
        token = max([x['name'] for x in items[-1:]] + prefixes[-1:])
        break
      if entry != name:
        prefixes.append(entry)
      else:
        items.append(_resource(bucket, name, self._find(bucket, name)))
    found = {'kind': 'storage#objects', 'items': items, 'prefixes': prefixes}
    return _json(
      {k: v for k, v in found.items() if v}
      | ({'nextPageToken': token} if token else {})
    )

  def _get(self, bucket, name, query, headers):
    self._ask('GET', bucket, name)
    stored = self._find(bucket, name)
    self._check(bucket, name, query)
    if query.get('alt') != 'media':
      return _json(_resource(bucket, name, stored))
    extra = {
      'x-goog-generation': str(stored.generation),
      'x-goog-hash': f'crc32c={_crc32c(stored.data)}',
      'x-goog-stored-content-length': str(len(stored.data)),
      'Content-Type': 'application/octet-stream',
    }
    wanted = re.fullmatch(r'bytes=(\d*)-(\d*)', headers.get('Range') or '')
    if not wanted or not stored.data:
      return 200, extra, stored.data
    size = len(stored.data)
    if wanted[1]:
      first = int(wanted[1])
      last = min(int(wanted[2] or size - 1), size - 1)
    else:
      first, last = max(size - int(wanted[2]), 0), size - 1
    if first >= size:
      raise Refused(416, f'{first} is behind the end')
    extra['Content-Range'] = f'bytes {first}-{last}/{size}'
    return 206, extra, stored.data[first : last + 1]

  def _delete(self, bucket, name, query, headers):
    del headers
    self._find(bucket, name)
    self._check(bucket, name, query)
    self._ask('DELETE', bucket, name)
    with self.lock:
      self.buckets[bucket].pop(name, None)
    return 204, {}, b''

  def _copy(self, bucket, name, to_bucket, to_name):
    data = self._find(bucket, name).data
    self._ask('PUT', to_bucket, to_name)
    resource = self.put(to_bucket, to_name, data)
    done = {'kind': 'storage#rewriteResponse', 'done': True}
    return _json(done | {'resource': resource, 'objectSize': str(len(data))})

  def _upload(self, method, bucket, query, headers, body):
    kind = query.get('uploadType')
    if kind == 'resumable' and 'upload_id' in query:
      return self._go_on(bucket, query['upload_id'], headers, body)
    if kind == 'resumable':
      name = query.get('name') or json.loads(body)['name']
      number = str(next(self._generations))
      self._uploads[number] = {'name': name, 'query': query, 'data': b''}
      where = f'{self.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable'
      return 200, {'Location': f'{where}&upload_id={number}'}, b''
    if kind == 'multipart':
      described, body = _parts(headers, body)
      name = query.get('name') or json.loads(described)['name']
    else:
      name = query['name']
    return self._store(bucket, name, query, body)

  def _go_on(self, bucket, number, headers, body):
    upload = self._uploads[number]
    upload['data'] += body
    total = re.fullmatch(
      r'bytes (?:\d+-\d+|\*)/(\d+|\*)', headers.get('Content-Range') or ''
    )
    if (
      total
      and total[1] == '*'
      or (total and len(upload['data']) < int(total[1]))
    ):
      last = len(upload['data']) - 1
      return 308, {'Range': f'bytes=0-{last}'} if last >= 0 else {}, b''
    return self._store(bucket, upload['name'], upload['query'], upload['data'])

  def _store(self, bucket, name, query, data):
    self._check(bucket, name, query)
    self._ask('PUT', bucket, name)
    return _json(self.put(bucket, name, data))

  def _batch(self, headers, body):
    """Several requests in one, as gcsfs deletes."""
    answers = []
    for part in _multipart(headers, body):
      line, _, _ = part.get_payload().lstrip().partition('\n')
      method, target, *_ = line.split()
      try:
        status, _, inner = self.answer(
          method, re.sub(r'^https?://[^/]+', '', target), {}, b''
        )
      except Refused as error:
        status, inner = error.status, _error(error)
      answers.append(
        '--batch\r\nContent-Type: application/http\r\nContent-ID: '
        f'{(part["Content-ID"] or "").replace("<", "<response-")}\r\n\r\n'
        f'HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\n'
        f'Content-Length: {len(inner)}\r\n\r\n{inner.decode()}\r\n'
      )
    text = ''.join(answers) + '--batch--'
    kind = {'Content-Type': 'multipart/mixed; boundary=batch'}
    return 200, kind, text.encode()


def _json(value: dict):
  text = json.dumps(value).encode()
  return 200, {'Content-Type': 'application/json'}, text


def _error(error: Refused) -> bytes:
  said = {'code': error.status, 'message': str(error)}
  return json.dumps({'error': said}).encode()


def _crc32c(data: bytes) -> str:
  import google_crc32c  # Of the extra `gcs`, without which no test comes here.

  return base64.b64encode(google_crc32c.Checksum(data).digest()).decode()


def _resource(bucket: str, name: str, stored: Stored) -> dict:
  return {
    'kind': 'storage#object',
    'id': f'{bucket}/{name}/{stored.generation}',
    'name': name,
    'bucket': bucket,
    'generation': str(stored.generation),
    'metageneration': '1',
    'contentType': 'application/octet-stream',
    'timeCreated': _DATE,
    'updated': _DATE,
    'storageClass': 'STANDARD',
    'size': str(len(stored.data)),
    'md5Hash': base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
    'crc32c': _crc32c(stored.data),
    'etag': str(stored.generation),
  }


def _multipart(headers, body: bytes) -> list:
  head = f'Content-Type: {headers["Content-Type"]}\r\n\r\n'.encode()
  return email.message_from_bytes(head + body).get_payload()


def _parts(headers, body: bytes) -> tuple[bytes, bytes]:
  """Description and contents of a multipart upload."""
  boundary = re.search(r'boundary=["\']?([^"\';]+)', headers['Content-Type'])[1]
  mark = b'--' + boundary.encode()
  _, described, contents = body.split(mark, 2)
  contents = contents[: contents.rindex(mark)]
  described, contents = (
    re.split(rb'\r?\n\r?\n', x, maxsplit=1)[1] for x in (described, contents)
  )
  return described.strip(), re.sub(rb'\r?\n\Z', b'', contents)


class _Server(ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    # Clients that are killed, or have seen enough, hang up.
    if not isinstance(sys.exception(), OSError):
      super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
  storage: FakeStorage
  protocol_version = 'HTTP/1.1'
  # Small answers at once.
  disable_nagle_algorithm = True

  def _serve(self):
    body = self._body()
    try:
      status, headers, body = self.storage.answer(
        self.command, self.path, self.headers, body
      )
    except Refused as error:
      status, headers, body = error.status, {}, _error(error)
    if status in (204, 304):
      body = b''  # Such answers have none, and the next would begin with it.
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    data = b''
    while size := int(self.rfile.readline().split(b';')[0], 16):
      data += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return data

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

  def log_message(self, *args):
    pass
