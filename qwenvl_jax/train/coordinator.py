"""What the processes of a run know of each other, beside JAX.

A collective waits for a process that died, some for ever, and JAX's own
coordinator ends a process without saying whom it missed. So each process keeps
a TCP connection to process 0 as long as the run lasts: that tells who has
arrived, who is alive, and passes small values around.
"""

import asyncio
import collections
import concurrent.futures
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from qwenvl_jax.errors import QwenVLError

# Exit status of the others when a process is lost: EX_TEMPFAIL of sysexits.h,
# "start the same command again".
LOST = 75

# Seconds between two signs of life, and without one until a process counts as
# lost (a process that dies closes its connection, which is noticed at once).
HEARTBEAT_INTERVAL_S = 5.0
HEARTBEAT_TIMEOUT_S = 60.0

# Seconds that one process may stand where the others have gone on from: longer
# than anything takes that they do not do together.
STALL_TIMEOUT_S = 1200.0

# Seconds that a process has to stop by itself once another is lost. It may
# stand in a collective that never returns.
EXIT_GRACE_S = 5.0

# Seconds between two attempts to reach process 0.
_CONNECT_RETRY_S = 0.25

_MAX_MESSAGE_BYTES = 2**24


class LostProcessError(QwenVLError):
  """Another process of the run is gone, failed or does not come.

  Attributes:
    status: that this process ends with.
  """

  def __init__(self, message: str, status: int = LOST):
    super().__init__(message)
    self.status = status


class Coordinator:
  """The processes of a run; one process alone needs no connection.

  Attributes:
    index: of this process.
    count: of processes.
    hosts: where each of them runs.
  """

  def __init__(
    self,
    index: int = 0,
    count: int = 1,
    end: Callable[[int], None] = os._exit,
  ):
    """Asks nobody yet: see `wait_for_all`.

    `end` ends this process, which may stand in a collective, with a status.
    """
    self._end = end
    self.index = index
    self.count = count
    self.hosts = [socket.gethostname()] * count
    self._rounds = 0
    self._at = 0
    # Of process 0: {process: (how far it is, since when)}.
    self._progress = {}
    self._lost = None
    self._leaving = False
    self._heard = {}
    self._writers = {}
    self._left = set()
    self._complete = asyncio.Event()
    # Of process 0: number of the round -> {process: message}.
    self._open = {}
    # Number of the round -> future of its values.
    self._answers = collections.defaultdict(lambda: self._loop.create_future())
    self._loop = None
    # The loop itself holds its tasks weakly.
    self._tasks = []

  def name(self, index: int) -> str:
    """How messages call a process."""
    return f'process {index} of {self.count} ({self.hosts[index]})'

  def wait_for_all(self, coordinator: str, timeout: float) -> None:
    """Waits some seconds until all processes are there.

    The port of `coordinator` (HOST:PORT of process 0) is free again afterwards.

    Raises:
      LostProcessError: process 0 does not answer, or names those that have not
        come.
    """
    host, port = coordinator.rsplit(':', 1)
    self._loop = asyncio.new_event_loop()
    threading.Thread(
      target=self._loop.run_forever, name='coordinator', daemon=True
    ).start()
    arrive = self._gather_members if self.index == 0 else self._arrive
    self._wait(arrive(host.strip('[]'), int(port), timeout))

  def gather(self, where: str, value: Any = None, timeout: float = 600) -> list:
    """The values of all processes, in each of them; a barrier, too.

    In the order of the processes, and such as JSON can hold. The last one comes
    within `timeout` seconds of the first to `where`, as errors call it.

    Raises:
      LostProcessError: names the processes that have not come here in time, or
        are lost.
    """
    if self.count == 1:
      return [value]
    self._rounds += 1
    return self._wait(self._ask(self._rounds, where, value, timeout))

  def heartbeat(self, place: int) -> None:
    """Notes how far this process is; it grows, and equally in all of them."""
    self._at = place

  def check(self) -> None:
    """Raises LostProcessError if another process is lost."""
    if self._lost is not None:
      raise self._lost

  def lost_within(self, seconds: float) -> LostProcessError | None:
    """The process that is lost by then, if any.

    A collective that fails because of it may fail before the loss is known.
    """
    deadline = time.monotonic() + seconds
    while self._lost is None and time.monotonic() < deadline:
      time.sleep(0.05)
    return self._lost

  def fail(self, message: str, status: int) -> None:
    """Tells the others why this process ends, before it does."""
    if self.count > 1:
      self._wait(self._fail(message, status), seconds=2 * EXIT_GRACE_S)

  def leave(self) -> None:
    """Ends the connection; the others have to come here, too."""
    if self.count > 1:
      self._leaving = True
      self._wait(self._say_goodbye(), seconds=HEARTBEAT_TIMEOUT_S)

  # What follows runs in the event loop, in a thread of its own.

  def _wait(self, coroutine: Coroutine, seconds: float | None = None) -> Any:
    future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
    try:
      return future.result(seconds)
    except concurrent.futures.TimeoutError:
      return None

  async def _gather_members(self, _, port, timeout) -> None:
    # Listens on all addresses, as JAX's coordinator does.
    try:
      server = await asyncio.start_server(
        self._welcome, None, port, limit=_MAX_MESSAGE_BYTES
      )
    except OSError as error:
      raise LostProcessError(
        f'{self.name(0)} cannot listen on port {port}: {error}. Is another run '
        'using it?',
        status=2,
      ) from error
    try:
      await asyncio.wait_for(self._complete.wait(), timeout)
    except TimeoutError:
      missing = sorted(set(range(1, self.count)) - self._writers.keys())
      numbers = ', '.join(map(str, missing[:16]))
      if len(missing) > 16:
        numbers += f' and {len(missing) - 16} more'
      came = [0, *sorted(self._writers)]
      hosts = ', '.join(f'{x} on {self.hosts[x]}' for x in came)
      message = (
        f'{len(came)} of {self.count} processes arrived within {timeout:g} s: '
        f'missing {numbers}; there are {hosts}'
      )
      await self._lose(message)
      raise LostProcessError(message) from None
    finally:
      # The connections stay; JAX's coordinator listens on this port next.
      server.close()
    await self._broadcast({'go': self.hosts})
    self._keep(self._send_heartbeats())

  async def _welcome(self, reader, writer) -> None:
    """Process 0 meets who connects."""
    try:
      hello = json.loads(
        await asyncio.wait_for(reader.readline(), HEARTBEAT_INTERVAL_S)
      )
      index, count, host = hello['hello'], hello['count'], hello['host']
    except (OSError, ValueError, KeyError, TypeError, TimeoutError):
      writer.close()  # Not one of us.
      return
    refused = None
    if count != self.count:
      refused = f'expects {count} processes, process 0 {self.count}'
    elif not 0 < index < count:
      refused = f'must have a number from 1 to {count - 1}'
    elif index in self._writers:
      refused = f'is there already, on {self.hosts[index]}'
    if refused:
      message = f'process {index} ({host}) {refused}'
      writer.write(_line({'refused': message}))
      writer.close()
      return
    self.hosts[index] = host
    self._writers[index] = writer
    self._heard[index] = self._loop.time()
    if len(self._writers) == self.count - 1:
      self._complete.set()
    await self._listen(index, reader)

  async def _arrive(self, host, port, timeout) -> None:
    """Another process meets process 0."""
    deadline = self._loop.time() + timeout
    hello = {'hello': self.index, 'count': self.count, 'host': self.hosts[0]}
    reached, last = False, None
    while self._loop.time() < deadline:
      try:
        reader, writer = await asyncio.wait_for(
          asyncio.open_connection(host, port, limit=_MAX_MESSAGE_BYTES),
          HEARTBEAT_INTERVAL_S,
        )
        reached = True
        writer.write(_line(hello))
        # Process 0 says who is missing; it may have started to wait last.
        left = deadline - self._loop.time() + timeout
        answer = json.loads(await asyncio.wait_for(reader.readline(), left))
      except (OSError, ValueError, TimeoutError) as error:
        last = error
        await asyncio.sleep(_CONNECT_RETRY_S)
        continue
      if 'go' in answer:
        self.hosts = answer['go']
        self._writers[0] = writer
        self._heard[0] = self._loop.time()
        self._keep(self._listen(0, reader))
        self._keep(self._send_heartbeats())
        return
      if 'refused' in answer:
        raise LostProcessError(answer['refused'], status=2)
      raise LostProcessError(answer['lost'], answer['status'])
    reason = str(last) or type(last).__name__
    raise LostProcessError(
      f'{self.name(self.index)}: the coordinator {host}:{port} '
      + ('ends the connection' if reached else 'does not answer')
      + f' for {timeout:g} s ({reason}): is process 0 running there, and may '
      'its port be reached?'
    )

  def _keep(self, coroutine: Coroutine) -> None:
    self._tasks.append(self._loop.create_task(coroutine))

  async def _send_heartbeats(self) -> None:
    """Gives signs of life, and looks for those of the others."""
    while self._lost is None and not self._leaving:
      for index in list(self._writers):
        self._send(index, {'alive': self.index, 'at': self._at})
        if self._loop.time() - self._heard[index] > HEARTBEAT_TIMEOUT_S:
          await self._lose(
            f'{self.name(index)} has not been heard of for '
            f'{HEARTBEAT_TIMEOUT_S:g} s'
          )
          return
      if self.index == 0:
        self._progressed(0, self._at)
        await self._find_stall()
      await asyncio.sleep(HEARTBEAT_INTERVAL_S)

  def _progressed(self, index: int, place: int) -> None:
    if self._progress.get(index, (None,))[0] != place:
      self._progress[index] = place, self._loop.time()

  async def _find_stall(self) -> None:
    """Finds a process that lives but does not go on, while the others wait."""
    most = max(place for place, _ in self._progress.values())
    for index, (place, since) in sorted(self._progress.items()):
      seconds = self._loop.time() - since
      if place < most and seconds > STALL_TIMEOUT_S:
        await self._lose(
          f'{self.name(index)} has stood before step {place + 1} for '
          f'{seconds:.0f} s while others are further'
        )

  async def _listen(self, index: int, reader) -> None:
    """Hears one other process until its connection ends."""
    while True:
      try:
        line = await reader.readline()
      except (OSError, ValueError):
        line = b''
      if not line.endswith(b'\n'):
        break
      self._heard[index] = self._loop.time()
      await self._hear(index, json.loads(line))
    self._writers.pop(index).close()
    if self.index == 0 and not self._complete.is_set():
      return  # Somebody may start it again before all are there.
    if index not in self._left and not self._leaving:
      await self._lose(f'{self.name(index)} is gone: it was killed or crashed')
      if index == 0:
        # With it went JAX's coordinator, and JAX will abort any moment.
        self._give_up()

  async def _hear(self, index: int, message: dict) -> None:
    if 'gather' in message:
      await self._collect(index, message)
    elif 'gathered' in message:
      self._answers[message['gathered']].set_result(message['values'])
    elif 'failed' in message:
      self._left.add(index)
      await self._lose(
        f'{self.name(index)} stopped: {message["failed"]}', message['status']
      )
    elif 'lost' in message:
      await self._lose(message['lost'], message['status'])
    elif 'alive' in message:
      self._progressed(index, message['at'])
    elif 'bye' in message:
      self._left.add(index)

  async def _ask(self, number, where, value, timeout) -> list:
    answer = self._answers[number]
    if self._lost is not None:
      raise self._lost
    message = {'gather': number, 'where': where, 'value': value}
    await self._post(message | {'timeout': timeout})
    try:
      return await answer
    finally:
      del self._answers[number]

  async def _collect(self, index: int, message: dict) -> None:
    """Process 0 notes what one process gives to a round."""
    number = message['gather']
    if number not in self._open:
      self._open[number] = {}
      self._loop.call_later(
        message['timeout'], self._keep_late, number, message
      )
    came = self._open[number]
    came[index] = message
    if len(came) < self.count:
      return
    del self._open[number]
    places = {came[x]['where']: x for x in reversed(range(self.count))}
    if len(places) > 1:
      stand = '; '.join(f'{self.name(x)}: {p}' for p, x in places.items())
      await self._lose(f'the processes do different things: {stand}', 2)
      return
    values = [came[x]['value'] for x in range(self.count)]
    await self._broadcast({'gathered': number, 'values': values})
    self._answers[number].set_result(values)

  def _keep_late(self, number: int, first: dict) -> None:
    if number not in self._open or self._lost is not None:
      return
    missing = [x for x in range(self.count) if x not in self._open[number]]
    names = ', '.join(self.name(x) for x in missing[:8])
    more = f' and {len(missing) - 8} more' if len(missing) > 8 else ''
    self._keep(
      self._lose(
        f'{names}{more} did not come to "{first["where"]}" within '
        f'{first["timeout"]:g} s after the others'
      )
    )

  async def _lose(self, message: str, status: int = LOST) -> None:
    """Notes that the run cannot go on, and tells everybody."""
    if self._lost is not None:
      return
    self._lost = LostProcessError(message, status)
    # Process 0 goes last, with the others' coordinator.
    grace = EXIT_GRACE_S if self.index else 1.5 * EXIT_GRACE_S
    self._loop.call_later(grace, self._give_up)
    for answer in self._answers.values():
      if not answer.done():
        answer.set_exception(self._lost)
    if self.index == 0:
      await self._broadcast({'lost': message, 'status': status})

  def _give_up(self) -> None:
    """Ends a process that may stand in a collective without end."""
    print(f'error: {self._lost}', file=sys.stderr, flush=True)
    self._end(self._lost.status)

  async def _post(self, message: dict) -> None:
    """Gives a message to process 0."""
    if self.index == 0:
      await self._hear(0, message)
    else:
      self._send(0, message)
      await self._drain()

  def _send(self, index: int, message: dict) -> None:
    if index in self._writers:
      self._writers[index].write(_line(message))

  async def _broadcast(self, message: dict) -> None:
    for index in list(self._writers):
      self._send(index, message)
    await self._drain()

  async def _drain(self) -> None:
    drains = [w.drain() for w in self._writers.values()]
    await asyncio.gather(*drains, return_exceptions=True)

  async def _fail(self, message: str, status: int) -> None:
    if self._lost is None:
      await self._post({'failed': message, 'status': status})
    await self._let_others_leave()

  async def _say_goodbye(self) -> None:
    await self._broadcast({'bye': self.index})
    await self._let_others_leave()
    for writer in self._writers.values():
      writer.close()

  async def _let_others_leave(self) -> None:
    while self.index == 0 and self._writers:
      await asyncio.sleep(0.02)


def _line(message: dict) -> bytes:
  return json.dumps(message).encode() + b'\n'
