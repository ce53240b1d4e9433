"""The engine's thread, and answers as asyncio sees them."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

from qwenvl_jax.infer.request import Answer, Request
from qwenvl_jax.infer.scheduler import Scheduler
from qwenvl_jax.sharding import use_all_devices

_LOG = logging.getLogger(__name__)


class Worker:
  """Runs a scheduler in a thread of its own.

  Attributes:
    scheduler: what answers.
    ready: whether everything is compiled.
    when_ready: called then.
  """

  def __init__(self, scheduler: Scheduler):
    self.scheduler = scheduler
    self.ready = False
    self.when_ready = lambda: None
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._run, name='engine', daemon=True
    )

  def start(self, warm_up: bool) -> None:
    """Starts the thread, which first compiles what requests may need."""
    self._warm_up = warm_up
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread; answers that run stay as they are."""
    self._stop.set()
    self._thread.join()

  @property
  def alive(self) -> bool:
    return self._thread.is_alive()

  def _run(self) -> None:
    try:
      with use_all_devices():
        if self._warm_up:
          self.scheduler.warm_up(scores=True)
        self.ready = True
        self.when_ready()
        self.scheduler.run(self._stop)
    except BaseException:
      _LOG.exception('the engine has stopped')

  def submit(self, request: Request) -> 'Listening':
    """Asks; call it in the event loop.

    Raises:
      DataError: the engine has no room for such a request.
      QueueFullError: too many are waiting.
    """
    return Listening(self.scheduler, request)


class Listening:
  """An answer, and when it grows."""

  def __init__(self, scheduler: Scheduler, request: Request):
    self._scheduler = scheduler
    self._grown = asyncio.Event()
    self._loop = asyncio.get_running_loop()
    self.answer: Answer = scheduler.submit(request, self._tell, 'the request')

  def _tell(self, answer: Answer) -> None:
    del answer
    try:
      self._loop.call_soon_threadsafe(self._grown.set)
    except RuntimeError:  # The loop is closed: the server has ended.
      self._scheduler.cancel(self.answer)

  async def grown(self) -> AsyncIterator[int]:
    """Yields how many tokens there are, each time that there are more.

    The last time, the answer is finished. Left early, it is cancelled.
    """
    try:
      while True:
        self._grown.clear()
        finished = self.answer.finished
        yield len(self.answer.tokens)
        if finished:
          return
        await self._grown.wait()
    finally:
      self.cancel()

  def cancel(self) -> None:
    """Ends the answer, if it has not ended."""
    if not self.answer.finished:
      self._scheduler.cancel(self.answer)
