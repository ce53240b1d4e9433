"""What a connection may take: how long it may stay silent, and how many are.

uvicorn waits for ever for the rest of a request that was begun, and for a
client that does not read its answer. Here both have an end.
"""

import asyncio
import resource
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

# For a whole request, from when a connection waits for it to its last byte.
REQUEST_SECONDS = 60.0
# For a client that reads nothing of what waits to be sent.
UNREAD_SECONDS = 60.0
# Of all headers of a request.
_HEADER_BYTES = 32 * 2**10
# Seconds that running answers have after SIGTERM.
_DRAIN_SECONDS = 30


class Connection(H11Protocol):
  """HTTP/1.1 on one connection, which ends if the client keeps it waiting."""

  _request_timer: asyncio.TimerHandle | None = None
  _unread_timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    if len(self.connections) > most_connections():
      transport.abort()
      return
    self._watch()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._watch()

  def on_response_complete(self) -> None:
    super().on_response_complete()
    self._watch()

  def pause_writing(self) -> None:
    super().pause_writing()
    self._unread_timer = self.loop.call_later(
      UNREAD_SECONDS, self.transport.abort
    )

  def resume_writing(self) -> None:
    super().resume_writing()
    _cancel(self._unread_timer)

  def connection_lost(self, exc: Exception | None) -> None:
    _cancel(self._unread_timer)
    _cancel(self._request_timer)
    super().connection_lost(exc)

  def _watch(self) -> None:
    """Starts the request's time, or stops it where all of it is there."""
    cycle = self.cycle
    if cycle and not cycle.more_body and not cycle.response_complete:
      _cancel(self._request_timer)
      self._request_timer = None
    elif self._request_timer is None:
      # Also for what was answered: a client that does not read the end of an
      # answer leaves nothing else to wait for.
      self._request_timer = self.loop.call_later(
        REQUEST_SECONDS, self.transport.abort
      )


def _cancel(timer: asyncio.TimerHandle | None) -> None:
  if timer is not None:
    timer.cancel()


def most_connections() -> int:
  """Connections at a time; the process needs files for other things, too."""
  return resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def uvicorn_config(app: Any, **settings) -> uvicorn.Config:
  """How uvicorn serves an application."""
  return uvicorn.Config(
    app,
    # By name: where httptools is installed, uvicorn takes it, which has no
    # limit on headers.
    http=Connection,
    ws='none',
    h11_max_incomplete_event_size=_HEADER_BYTES,
    timeout_graceful_shutdown=_DRAIN_SECONDS,
    server_header=False,
    **settings,
  )
