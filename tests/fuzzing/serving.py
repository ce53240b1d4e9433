"""Requests over HTTP that nobody should send, and what a server owes them."""

import base64
import copy
import dataclasses
import io
import json
import random
import re
import socket
import time

from PIL import Image

FORMATS = ('PNG', 'JPEG', 'GIF', 'WEBP', 'BMP')


def picture(form: str = 'PNG', size=(9, 7)) -> bytes:
  buffer = io.BytesIO()
  Image.new('RGB', size, 'red').save(buffer, form)
  return buffer.getvalue()


def data_url(data: bytes) -> str:
  return 'data:image/png;base64,' + base64.b64encode(data).decode()


CHAT = {
  'model': 'tiny',
  'messages': [
    {'role': 'system', 'content': 'Be brief.'},
    {
      'role': 'user',
      'content': [
        {'type': 'image_url', 'image_url': {'url': data_url(picture())}},
        {'type': 'text', 'text': 'What is this?'},
      ],
    },
  ],
  'max_tokens': 4,
  'temperature': 0.5,
  'top_p': 0.9,
  'top_k': 5,
  'min_p': 0.1,
  'n': 1,
  'seed': 7,
  'stop': ['x'],
  'stop_token_ids': [5],
  'logit_bias': {'5': 1},
  'logprobs': True,
  'top_logprobs': 2,
  'presence_penalty': 0.5,
  'frequency_penalty': 0.5,
  'repetition_penalty': 1.1,
  'response_format': {'type': 'text'},
  'structured_outputs': {'choice': ['yes', 'no']},
  'stream': False,
  'user': 'me',
}
COMPLETION = {
  'model': 'tiny',
  'prompt': ['I see', 'Hello'],
  'max_tokens': 3,
  'echo': True,
  'logprobs': 1,
  'n': 1,
  'temperature': 0,
}
BODIES = {
  '/v1/chat/completions': CHAT,
  '/v1/completions': COMPLETION,
  '/tokenize': {'prompt': 'Hello', 'model': 'tiny'},
  '/detokenize': {'tokens': [1, 2, 3]},
}
ODD = (
  None, True, False, 0, -1, 1, 3, 10**9, 10**30, -(10**30), 0.5, 1e308, 1e-300,
  '', 'x', 'x' * 5000, '<|im_end|>', '<img>a</img>', '\ud83d', '\0', 'ä' * 99,
  [], {}, [[]], [{}], [None], ['a', 1], {'a': 1}, {'url': 'file:///etc/passwd'},
  'http://127.0.0.1/', 'data:,x', data_url(picture())[:60], 'user', 'assistant',
  {'type': 'json_schema', 'json_schema': {'schema': {'type': 'nothing'}}},
  {'type': 'json_object'}, {'regex': '('}, {'regex': 'a{1000}{1000}'},
  {'json': '{'}, {'boxes': True}, {'choice': []}, {'choice': ['a'] * 20},
  [0] * 500, list(range(300)), {'5': 1e9}, {'-1': 1}, {'x': 1},
)  # fmt: skip
# Some of these are whole heads of their own.
HEADERS = (
  b'Content-Type: text/plain', b'Content-Type: multipart/form-data; boundary=x',
  b'Content-Type: application/json; charset=utf-7', b'Content-Encoding: gzip',
  b'Transfer-Encoding: chunked', b'Transfer-Encoding: gzip, chunked',
  b'Content-Length: 5', b'Content-Length: -1', b'Content-Length: 1e3',
  b'Content-Length: 99999999999999999999', b'Content-Length: 00000000000005',
  b'Authorization: Basic eDp5', b'Authorization: Bearer \xff\xfe',
  b'Authorization:', b'Expect: 100-continue', b'Upgrade: websocket',
  b'Connection: Upgrade', b'Host: a\r\nHost: b', b'X: \x00', b'no colon',
  b' folded', b': none', b'X-Request-Id: a\tb', b'X-Request-Id: ' + b'i' * 900,
  b'X: ' + b'y' * 40_000, b'\r\n'.join(b'X-%d: 1' % i for i in range(2000)),
  b'Range: bytes=0-', b'Cookie: ' + b'a=b; ' * 500, b'\r\n\r\nGET / HTTP/1.1',
)  # fmt: skip
PATHS = (
  b'/health', b'/ready', b'/version', b'/metrics', b'/v1/models',
  b'/v1/models/tiny', b'/v1/models/%00', b'/v1/models/../../etc/passwd',
  b'/docs', b'/openapi.json', b'/', b'//', b'/v1', b'/%ff', b'*', b'/x?a=%',
  b'/' + b'x' * 5000, b'http://other/v1/models', b'/v1/chat/completions/',
)  # fmt: skip
METHODS = (
  *(b'GET', b'POST', b'PUT', b'DELETE', b'HEAD', b'OPTIONS', b'PATCH'),
  *(b'TRACE', b'CONNECT', b'get', b'X' * 50, b'PRI'),
)
# What no answer may have in it, unless it was sent.
SECRETS = ('Traceback', '.py', '/etc', 'object at', 'site-packages')


@dataclasses.dataclass(frozen=True)
class Case:
  """A request.

  Attributes:
    kind: of `KINDS`.
    data: what is sent.
    reads: bytes of the answer after which the client goes; None for all.
    strict: whether it is HTTP, so that there must be an answer.
  """

  kind: str
  data: bytes
  reads: int | None = None
  strict: bool = True


def mutated(rng: random.Random, body):
  """A body with some of its values changed, or its keys."""
  body = json.loads(json.dumps(body))
  for _ in range(rng.choice((0, 1, 1, 2, 4))):
    place = body
    while True:
      keys = [*place] if isinstance(place, dict) else [*range(len(place))]
      if not keys:
        break
      key = rng.choice(keys)
      inner = place[key]
      if isinstance(inner, (dict, list)) and inner and rng.random() < 0.7:
        place = inner
        continue
      change = rng.random()
      if change < 0.75:
        place[key] = copy.deepcopy(rng.choice(ODD))
      elif change < 0.85:
        del place[key]
      elif isinstance(place, dict):
        place[rng.choice(('tools', 'x' * 300, 'best_of', 'é'))] = inner
      else:
        place.extend(copy.deepcopy([inner] * rng.choice((1, 30))))
      break
  return body


def damaged(rng: random.Random, data: bytes) -> bytes:
  """Bytes of which some are changed, left out or doubled."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 8))):
    at = rng.randrange(len(data) or 1)
    change = rng.random()
    if change < 0.6:
      data[at : at + 1] = bytes([rng.randrange(256)])
    elif change < 0.8:
      del data[at : at + rng.choice((1, 4, 1000))]
    else:
      data[at:at] = data[at : at + 64]
  return bytes(data)


def http(
  path: str | bytes, body: bytes | None, key: str, headers=(), method=b'POST'
) -> bytes:
  """The bytes of a request on a connection of its own."""
  path = path.encode() if isinstance(path, str) else path
  lines = [method + b' ' + path + b' HTTP/1.1', b'Host: localhost']
  lines += [b'Connection: close', f'Authorization: Bearer {key}'.encode()]
  if body is not None:
    lines += [b'Content-Type: application/json']
    lines += [b'Content-Length: %d' % len(body)]
  return b'\r\n'.join([*lines, *headers, b'', body or b''])


def _post(rng, path=None) -> tuple[str, bytes]:
  path = path or rng.choice([*BODIES, '/v1/chat/completions'])
  return path, json.dumps(mutated(rng, BODIES[path])).encode()


def _body(rng, key):
  return Case('body', http(*_post(rng), key))


def _bytes(rng, key):
  path, body = _post(rng)
  return Case('bytes', http(path, damaged(rng, body), key))


def _picture(rng, key):
  data = picture(rng.choice(FORMATS), (rng.randint(1, 40), rng.randint(1, 40)))
  # The beginning, where formats keep what matters.
  head = rng.choice((12, 40, len(data)))
  data = damaged(rng, data[:head]) + data[head:]
  body = json.loads(json.dumps(CHAT))
  body['messages'][1]['content'][0]['image_url']['url'] = data_url(data)
  return Case('picture', http(*_chat(body), key))


def _chat(body) -> tuple[str, bytes]:
  return '/v1/chat/completions', json.dumps(body).encode()


def _headers(rng, key):
  more = rng.sample(HEADERS, rng.choice((1, 1, 2, 4)))
  return Case('headers', http(*_post(rng), key, more), strict=False)


def _route(rng, key):
  body = rng.choice((None, b'', b'{}', b'{"model": "other"}', b'\xff' * 99))
  method, path = rng.choice(METHODS), rng.choice(PATHS)
  return Case('route', http(path, body, key, (), method), strict=False)


def _key(rng, key):
  wrong = rng.choice(('', 'x', key[:-1], f'{key}x', key.upper(), 'é' * 9))
  return Case('key', http(*_post(rng), wrong))


def _cut(rng, key):
  data = http(*_post(rng), key)
  return Case('cut', data[: rng.randrange(len(data))], 0, strict=False)


def _stream(rng, key):
  body = {k: v for k, v in CHAT.items() if k != 'structured_outputs'}
  body |= {'stream': True, 'n': rng.choice((1, 3)), 'stop': None}
  body |= {'max_tokens': rng.choice((1, 8, 100)), 'ignore_eos': True}
  body |= rng.choice(({}, {'stream_options': {'include_usage': True}}))
  reads = rng.choice((None, 0, 1, 300, 3000))
  return Case('stream', http(*_chat(body), key), reads)


KINDS = {
  'body': _body,
  'bytes': _bytes,
  'picture': _picture,
  'headers': _headers,
  'route': _route,
  'key': _key,
  'cut': _cut,
  'stream': _stream,
}


def make(seed: int, key: str) -> Case:
  """The request of a seed; kinds take turns."""
  kind = [*KINDS.values()][seed % len(KINDS)]
  return kind(random.Random(f'serving {seed}'), key)


def connect(port: int, seconds: float = 60.0) -> socket.socket:
  return socket.create_connection(('127.0.0.1', port), timeout=seconds)


def send(port: int, case: Case) -> bytes:
  """Sends a request; returns what came back before the client left."""
  answer = b''
  # Where a length is wrong, both sides wait for the other.
  with connect(port, 60 if case.strict else 0.5) as connection:
    try:
      connection.sendall(case.data)
      while case.reads is None or len(answer) < case.reads:
        more = connection.recv(65536)
        if not more:
          break
        answer += more
    except (BrokenPipeError, ConnectionResetError):
      pass  # Refused before all was sent; what is kept is what came.
    except TimeoutError:
      if case.strict:
        raise
  return answer


def judge(case: Case, answer: bytes) -> tuple[str, str]:
  """(status or 'none', what is wrong or '') of an answer."""
  found = re.match(rb'HTTP/1\.1 (\d{3}) ', answer)
  if not found:
    owed = case.strict and case.reads is None
    return 'none', 'no answer' if owed else ''
  status, text = found[1].decode(), answer.decode('utf-8', 'replace')
  if status.startswith('5') or '"server_error"' in text:
    return status, 'the server failed'
  sent = case.data.decode('latin-1')
  for secret in SECRETS:
    if secret in text and secret not in sent and b'<html' not in answer:
      return status, f'{secret!r} in the answer'
  if case.strict and case.reads is None and status.startswith('4'):
    try:
      error = json.loads(text.partition('\r\n\r\n')[2])['error']
    except (ValueError, KeyError):
      return status, "not OpenAI's form"
    if set(error) != {'message', 'type', 'param', 'code'}:
      return status, "not OpenAI's form"
  return status, ''


def measured(port: int, key: str, name: str) -> float:
  """What `/metrics` says of one number, summed over its labels."""
  case = Case('', http('/metrics', None, key, method=b'GET'))
  lines = send(port, case).decode().splitlines()
  values = [
    float(line.rsplit(' ', 1)[1])
    for line in lines
    if line.startswith(f'vllm:{name}{{')
  ]
  if not values:
    raise ValueError(f'/metrics has no {name}: {lines[:1]}')
  return sum(values)


def still_busy(port: int, key: str, seconds: float = 30.0) -> int:
  """Requests that hold a slot, or wait for one, though nobody asks any more."""
  ends = time.monotonic() + seconds
  names = 'num_requests_running', 'num_requests_waiting'
  while True:
    left = sum(int(measured(port, key, name)) for name in names)
    if not left or time.monotonic() > ends:
      return left
    time.sleep(0.1)
