"""TensorBoard scalars, written in the thread that asks for them.

tensorboardX's `SummaryWriter` writes in a thread of its own, which dies with a
traceback when the disk is full; its file format is all that is needed.
"""

import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

# Seconds between two writes to disk.
_FLUSH = 5.0


class Events:
  """One event file of a run."""

  def __init__(self, folder: Path, start: int):
    """Opens a new event file.

    Args:
      folder: of the event files of the run.
      start: the step that the run goes on from; TensorBoard forgets what older
        files say about later steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
    event = self._event(start + 1)
    event.session_log.status = event_pb2.SessionLog.START
    self._writer.write_event(event)
    self._flushed = 0.0

  def _event(self, step: int) -> event_pb2.Event:
    return event_pb2.Event(wall_time=time.time(), step=step)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds scalars of one step."""
    for name, value in scalars.items():
      event = self._event(step)
      event.summary.CopyFrom(scalar(name, value))
      self._writer.write_event(event)
    if time.monotonic() - self._flushed > _FLUSH:
      self.flush()

  def flush(self) -> None:
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()
