"""Clients that a server must survive, and those that it should be there for."""

import asyncio
import collections
import contextlib
import json
import random
import re
import socket

from fuzzing.serving import CHAT, http

_PATH = '/v1/chat/completions'
# Patience with a server that is busy with all the others.
_SECONDS = 120.0


def _chat(key: str, **settings) -> bytes:
  messages = [{'role': 'user', 'content': 'Hello'}]
  body = {'messages': messages, 'temperature': 0} | settings
  return http(_PATH, json.dumps(body).encode(), key)


class Clients:
  """All kinds of clients of one server, until they are stopped.

  Attributes:
    counts: (kind, status) -> answers; 'closed' for none, as the server ended
      the connection, and 'left' where the client did.
    wrong: answers of well-behaved clients that were not `answer`.
  """

  def __init__(self, port: int, key: str, answer: str):
    """Makes the clients.

    Args:
      port: of the server on this machine.
      key: its API key.
      answer: what its model says to everything.
    """
    self._port, self._key, self._answer = port, key, answer
    self._rng = random.Random(0)
    self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
    self.wrong: list[str] = []

  @property
  def failures(self) -> int:
    """Answers of 5xx."""
    return sum(
      count for (_, status), count in self.counts.items() if status[0] == '5'
    )

  async def run(self, seconds: float) -> None:
    """Lets all of them ask for so long."""
    # (client, how many at a time, seconds between two of their requests)
    crew = (
      (self.normal, 3, 0.5),
      (self.slow, 3, 1.0),
      (self.silent, 8, 0.1),
      (self.unread, 3, 1.0),
      (self.vanishing, 3, 1.0),
      (self.oversize, 1, 10.0),
      (self.crowd, 1, 15.0),
    )
    tasks = [
      asyncio.create_task(self._again(client, pause))
      for client, number, pause in crew
      for _ in range(number)
    ]
    try:
      done, _ = await asyncio.wait(
        tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION
      )
    finally:
      # Again until they end: `wait_for` of Python 3.11 loses a cancellation
      # that comes together with its result.
      running = set(tasks)
      while running:
        for task in running:
          task.cancel()
        _, running = await asyncio.wait(running, timeout=1)
      await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
      task.result()

  async def _again(self, client, pause: float) -> None:
    while True:
      try:
        status = await client()
      except (OSError, asyncio.IncompleteReadError):
        status = 'closed'
      self.counts[client.__name__, status] += 1
      await asyncio.sleep(pause * (0.5 + self._rng.random()))

  @contextlib.asynccontextmanager
  async def _connection(self, buffer: int | None = None):
    plain = socket.socket()
    plain.setblocking(False)
    if buffer:
      plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    loop = asyncio.get_running_loop()
    try:
      await loop.sock_connect(plain, ('127.0.0.1', self._port))
    except BaseException:
      plain.close()
      raise
    # As much as `buffer` is held here, too.
    reader, writer = await asyncio.open_connection(
      sock=plain, limit=buffer or 2**16
    )
    try:
      yield reader, writer
    finally:
      writer.transport.abort()

  async def normal(self) -> str:
    """Asks, and knows the answer."""
    stream = self._rng.random() < 0.5
    async with self._connection() as (reader, writer):
      writer.write(_chat(self._key, stream=stream))
      answer = await asyncio.wait_for(reader.read(-1), _SECONDS)
    text = answer.decode()
    if stream:
      deltas = re.findall(r'"content": "([^"]*)"', text)
      said = ''.join(deltas)
    else:
      found = re.search(r'"content":"([^"]*)"', text)
      said = found[1] if found else text[:500]
    if said != self._answer:
      self.wrong.append(text[:500])
    return _status(answer)

  async def slow(self) -> str:
    """Sends and reads a little at a time."""
    data = http(_PATH, json.dumps(CHAT | {'model': None}).encode(), self._key)
    answer = b''
    async with self._connection() as (reader, writer):
      step = -(-len(data) // 20)
      for start in range(0, len(data), step):
        writer.write(data[start : start + step])
        await asyncio.sleep(0.2)
      while more := await asyncio.wait_for(reader.read(100), _SECONDS):
        answer += more
        await asyncio.sleep(0.1)
    return _status(answer)

  async def silent(self) -> str:
    """Says nothing, or half of a head or of a body, until it is sent away."""
    data = _chat(self._key)
    said = self._rng.choice((0, 1, 60, len(data) - 5))
    async with self._connection() as (reader, writer):
      writer.write(data[:said])
      answer = await reader.read(-1)
    return _status(answer) if answer else 'closed'

  async def unread(self) -> str:
    """Asks for much, and reads nothing of it."""
    settings = {'stream': True, 'n': 8, 'logprobs': True, 'top_logprobs': 20}
    settings |= {'max_tokens': 200, 'ignore_eos': True}
    async with self._connection(2048) as (reader, writer):
      writer.write(_chat(self._key, **settings))
      await reader.read(1)
      for _ in range(100):
        await asyncio.sleep(1)
        if reader.exception() or writer.is_closing():
          return 'closed'
    return 'left'

  async def vanishing(self) -> str:
    """Asks for much, and leaves."""
    settings = {'stream': self._rng.random() < 0.5, 'max_tokens': 400}
    async with self._connection() as (_, writer):
      writer.write(_chat(self._key, ignore_eos=True, **settings))
      await asyncio.sleep(self._rng.choice((0, 0.05, 0.5)))
    return 'left'

  async def oversize(self) -> str:
    """Sends more than it may, and may not say so before."""
    head = http(_PATH, None, self._key)[:-2]
    told = self._rng.random() < 0.5
    chunk = b'x' * 2**20
    async with self._connection() as (reader, writer):
      if told:
        writer.write(head + b'Content-Length: %d\r\n\r\n' % (40 * 2**20))
      else:
        writer.write(head + b'Transfer-Encoding: chunked\r\n\r\n')
      with contextlib.suppress(ConnectionError):
        for _ in range(40):
          writer.write(chunk if told else b'100000\r\n' + chunk + b'\r\n')
          await writer.drain()
      return _status(await asyncio.wait_for(reader.read(15), _SECONDS))

  async def crowd(self) -> str:
    """Two hundred connections at once."""

    async def one():
      async with self._connection() as (reader, writer):
        writer.write(http('/health', None, self._key, method=b'GET'))
        return _status(await asyncio.wait_for(reader.read(-1), _SECONDS))

    found = await asyncio.gather(*(one() for _ in range(200)))
    return max(found)


def _status(answer: bytes) -> str:
  found = re.match(rb'HTTP/1\.1 (\d{3}) ', answer)
  return found[1].decode() if found else 'closed'
