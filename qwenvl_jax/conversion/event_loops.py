"""Event loops that end what still runs in them before they close.

Orbax reads the arrays of a checkpoint as tasks of a loop of its own. When one
of them fails, it closes the loop under the others (Orbax 0.12,
`asyncio_utils.run_sync`). Each of those complains whenever it is collected as
garbage, in thirty lines of TensorStore's settings, or was never awaited.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

# Policies are of a process: one thread changes them at a time.
_CHANGING = threading.RLock()


@contextlib.contextmanager
def ended_tasks() -> Iterator[None]:
  """Has the loops that are made within end their tasks when they close."""
  with _CHANGING:
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    try:
      yield
    finally:
      asyncio.set_event_loop_policy(before)


class _Loop(asyncio.SelectorEventLoop):
  def close(self):
    tasks = set() if self.is_closed() else asyncio.all_tasks(self)
    if tasks:
      self.run_until_complete(_end(tasks))
    super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self):
    return _Loop()


async def _end(tasks):
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)
