"""Clients that are slow, silent, or too many."""

import asyncio
import contextlib
import http.client
import socket
import time
import urllib.parse

import httpx
import reciter
from fuzzing import serving
from fuzzing.clients import Clients
from serve_support import KEY, running

from qwenvl_jax.serve import connections

QUESTION = b'{"messages": [{"role": "user", "content": "Hello"}]}'


def port_of(address):
  return urllib.parse.urlsplit(address).port


def ended(connection, seconds=20):
  """What came until the server ended the connection."""
  connection.settimeout(seconds)
  data = b''
  with contextlib.suppress(ConnectionError):
    while more := connection.recv(2**20):
      data += more
  return data


def test_who_says_nothing_is_sent_away(address, monkeypatch):
  monkeypatch.setattr(connections, 'REQUEST_SECONDS', 0.3)
  whole = serving.http('/v1/chat/completions', QUESTION, KEY)
  for said in b'', b'GET', whole[:60], whole[:-1]:
    with serving.connect(port_of(address)) as connection:
      connection.sendall(said)
      assert ended(connection) == b''
  # Whoever has asked may wait for longer.
  body = QUESTION[:-1] + b', "ignore_eos": true, "max_tokens": 150}'
  with serving.connect(port_of(address)) as connection:
    connection.sendall(serving.http('/v1/chat/completions', body, KEY))
    assert b' 200 OK' in ended(connection, 120)


def test_a_connection_is_used_again(address, monkeypatch):
  monkeypatch.setattr(connections, 'REQUEST_SECONDS', 0.3)
  headers = _key() | {'Content-Type': 'application/json'}
  connection = http.client.HTTPConnection('127.0.0.1', port_of(address))
  for _ in range(3):
    connection.request('POST', '/v1/chat/completions', QUESTION, headers)
    answer = connection.getresponse()
    assert answer.status == 200
    answer.read()
  connection.close()


def test_who_does_not_read_is_sent_away(address, monkeypatch):
  monkeypatch.setattr(connections, 'UNREAD_SECONDS', 0.3)
  head = f'GET /openapi.json HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}'
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(('127.0.0.1', port_of(address)))
    connection.settimeout(30)
    with contextlib.suppress(ConnectionError):
      connection.sendall(f'{head}\r\n\r\n'.encode() * 300)
      time.sleep(1)
    one = len(httpx.get(f'{address}/openapi.json', headers=_key()).content)
    assert len(ended(connection)) < 300 * one


def _key():
  return {'Authorization': f'Bearer {KEY}'}


def test_there_are_only_so_many(address, monkeypatch):
  monkeypatch.setattr(connections, 'most_connections', lambda: 2)
  with contextlib.ExitStack() as stack:
    first, second, third = (
      stack.enter_context(serving.connect(port_of(address))) for _ in range(3)
    )
    assert ended(third) == b''
    first.sendall(b'GET /health HTTP/1.1\r\nHost: a\r\n\r\n')
    assert first.recv(100).startswith(b'HTTP/1.1 200')
  ends = time.monotonic() + 20
  while True:  # Until the others are gone.
    with contextlib.suppress(httpx.HTTPError):
      assert httpx.get(f'{address}/health').status_code == 200
      break
    assert time.monotonic() < ends


def test_headers_are_bounded(address):
  head = b'GET /health HTTP/1.1\r\nHost: a\r\n'
  for more in b'X: ' + b'y' * 400_000, b'X: 1\r\n' * 60_000:
    with serving.connect(port_of(address)) as connection:
      with contextlib.suppress(ConnectionError):
        connection.sendall(head + more)
      assert b'200 OK' not in ended(connection)
  assert httpx.get(f'{address}/health').status_code == 200


def parts(count, size):
  for _ in range(count):
    yield b'x' * size


def test_bodies_are_bounded_alone_and_together(make_server):
  def status(count, size):
    return httpx.post(
      f'{address}/v1/completions', content=parts(count, size)
    ).status_code

  with running(make_server(key=None, body_bytes=5000)) as address:
    # No length is announced.
    assert status(4, 1000) == 400
    assert status(6, 1000) == 413
  server = make_server(key=None, bodies_bytes=5000)
  with running(server) as address:
    url = urllib.parse.urlsplit(address)
    with serving.connect(url.port) as first:
      # Another request has most of the room.
      first.sendall(serving.http('/v1/completions', b'x' * 9999, KEY)[:4500])
      ends = time.monotonic() + 20
      while status(1, 2000) != 429:
        assert time.monotonic() < ends
    while status(1, 2000) != 400:
      assert time.monotonic() < ends


def test_a_short_soak(address, server, monkeypatch):
  # `Clients.slow` takes 4 seconds to send a request.
  monkeypatch.setattr(connections, 'REQUEST_SECONDS', 12.0)
  port = port_of(address)
  clients = Clients(port, KEY, reciter.ANSWER)
  enough = {
    ('normal', '200'): 5,
    ('slow', '200'): 1,
    ('vanishing', 'left'): 5,
    ('silent', 'closed'): 5,
    ('crowd', '200'): 1,
  }

  async def soak():
    asking = asyncio.create_task(clients.run(seconds=300))
    while any(clients.counts[key] < count for key, count in enough.items()):
      assert not asking.done(), clients.counts
      await asyncio.sleep(0.1)
    asking.cancel()
    await asyncio.wait({asking})

  asyncio.run(soak())
  assert not clients.failures and not clients.wrong
  assert not serving.still_busy(port, KEY)
  scheduler = server.worker.scheduler
  assert scheduler.load.free == scheduler.engine.slots
