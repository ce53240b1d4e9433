"""What a run says while it runs: bar or lines, log.jsonl, TensorBoard."""

import json
import math
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from qwenvl_jax import buckets
from qwenvl_jax.errors import printable
from qwenvl_jax.train.log_upload import LogUpload
from qwenvl_jax.train.step import COUNTS

LOG_FILE = 'log.jsonl'
TENSORBOARD = 'tensorboard'

# Seconds between two writes of events to disk.
_FLUSH_S = 5.0


class Reporter:
  """Writes the records of the process that owns the run's folder."""

  def __init__(self, workdir: Path, start: int, stop: int, quiet=False):
    """Continues the logs of a run.

    Args:
      start: step the run goes on from; later records of an earlier start are
        dropped, they will be written again.
      quiet: write nothing (other processes of a multi-process run).
    """
    self._quiet = quiet
    self._stop = stop
    self._began = time.perf_counter(), start
    self._bar = None
    if quiet:
      return
    self._sinks = {}
    self._events = None
    self._upload = None
    log, events = workdir / LOG_FILE, workdir / TENSORBOARD
    if buckets.in_bucket(workdir):
      self._upload = LogUpload(workdir, self.say)
      log = self._upload.fetch(LOG_FILE)
      events = self._upload.folder / TENSORBOARD
    self._attempt(LOG_FILE, lambda: self._open_log(log, start))
    self._attempt(TENSORBOARD, lambda: self._open_events(events, start))
    console = Console(stderr=True)
    if console.is_terminal:
      self._bar = Progress(
        TextColumn(printable(workdir.name) or 'train'),
        BarColumn(),
        _Columns(),
        console=console,
      )
      self._task = self._bar.add_task(
        '', total=stop, completed=start, record={}, compiling=None
      )
      self._bar.start()

  def _open_log(self, path: Path, start: int) -> None:
    _drop_records_after(path, start)
    # Line by line, so that a kill costs one record at most.
    log = path.open('a', buffering=1)

    def write(record):
      log.write(json.dumps(record) + '\n')

    self._sinks[LOG_FILE] = write, log.close

  def _open_events(self, path: Path, start: int) -> None:
    events = self._events = _Events(path, start)
    self._sinks[TENSORBOARD] = events.write, events.close

  def compiling(self) -> None:
    """Says on the bar that, and since when, the step is compiled."""
    if self._bar:
      self._bar.update(self._task, compiling=time.perf_counter())

  def compiled(self, seconds: float) -> None:
    """Says how long compilation took, and leaves it out of the time left."""
    clock, start = self._began
    self._began = clock + seconds, start
    if self._bar:
      self._bar.update(self._task, compiling=None)
    self.say(f'compiled the training step in {seconds:.1f} s')

  def step(self, step: int) -> None:
    """Moves the bar."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def record(self, record: dict, remark: str = '') -> None:
    """Writes one record everywhere, and a remark beside it for people."""
    if self._quiet:
      return
    finite = {
      k: v if v is None or math.isfinite(v) else None for k, v in record.items()
    }
    self._write(finite)
    if self._upload:
      self._upload.now_and_then()
    if self._bar:
      self._bar.update(self._task, completed=record['step'], record=finite)
      if remark:
        self.say(f'step {record["step"]}: {remark}')
    else:
      line = f'step {record["step"]}/{self._stop}  {self._line(finite)}'
      self.say(f'{line}  {remark}' if remark else line)

  def flush(self) -> None:
    """Sees to it that what was written so far is in the run's folder."""
    if self._quiet or not self._upload:
      return
    if TENSORBOARD in self._sinks:
      self._attempt(TENSORBOARD, self._events.flush)
    self._upload.flush()

  def rolled_back(self, step: int, start: int, why: str) -> None:
    """Notes that the run goes on from step `start`, and why."""
    self._began = time.perf_counter(), start
    self.say(f'warning: {why}: back to step {start}, leaving out that data')
    if self._quiet:
      return
    self._write({'step': start, 'rolled_back_from': step})

  def _write(self, record: dict) -> None:
    for name, (write, _) in list(self._sinks.items()):
      self._attempt(name, lambda write=write: write(record))

  def _attempt(self, name: str, action) -> None:
    """A run does not end for its logs: a full disk stops them only."""
    try:
      action()
    except OSError as error:
      self._sinks.pop(name, None)
      self.say(f'warning: {name} ends here: {error}')

  def _line(self, record: dict) -> str:
    clock, start = self._began
    done = record['step'] - start
    left = self._stop - record['step']
    seconds = (time.perf_counter() - clock) / max(done, 1) * left
    return f'{describe(record)}  eta {_duration(seconds)}'

  def say(self, message: str) -> None:
    """A line for people, above the bar where there is one."""
    if self._quiet:
      return
    if self._bar:
      self._bar.console.print(printable(message), markup=False, highlight=False)
    else:
      print(message, file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._quiet:
      return
    if self._bar:
      self._bar.stop()
    for name, (_, close) in list(self._sinks.items()):
      self._attempt(name, close)
    if self._upload:
      self._upload.close()


def describe(record: dict) -> str:
  """The numbers of a record that fit on a line."""
  parts = []
  if 'heldout_loss' in record:
    parts.append(f'held-out loss {record["heldout_loss"]:.4f}')
  parts += [
    f'{name.removeprefix("eval/")} {score:.4f}'
    for name, score in record.items()
    if name.startswith('eval/') and score is not None
  ]
  if 'loss' in record:
    loss = record['loss']
    parts.append('loss -' if loss is None else f'loss {loss:.4f}')
  if record.get('accuracy') is not None:
    parts.append(f'accuracy {record["accuracy"]:.3f}')
  if 'learning_rate' in record:
    parts.append(f'rate {record["learning_rate"]:.2e}')
  for name in COUNTS:
    if f'{name}_per_second' in record:
      parts.append(f'{record[f"{name}_per_second"]:.0f} {name}/s')
  if 'waiting_for_data' in record:
    parts.append(f'waiting for data {record["waiting_for_data"]:.0%}')
  if record.get('skipped'):
    parts.append(f'skipped {record["skipped"]}')
  return '  '.join(parts)


class _Events:
  """One event file of TensorBoard, written in the thread that asks for it.

  tensorboardX's `SummaryWriter` writes in a thread of its own, which dies with
  a traceback when the disk is full; its file format is all that is needed.
  """

  def __init__(self, folder: Path, start: int):
    """Opens a new file; what older ones say of steps after `start` is void."""
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
    event = self._event(start + 1)
    event.session_log.status = event_pb2.SessionLog.START
    self._writer.write_event(event)
    self._flushed = 0.0

  def _event(self, step: int) -> event_pb2.Event:
    return event_pb2.Event(wall_time=time.time(), step=step)

  def write(self, record: dict[str, float | None]) -> None:
    """Adds the scalars of one step."""
    for name, value in record.items():
      if name != 'step' and value is not None:
        event = self._event(record['step'])
        event.summary.CopyFrom(scalar(name, value))
        self._writer.write_event(event)
    if time.monotonic() - self._flushed > _FLUSH_S:
      self.flush()

  def flush(self) -> None:
    self._writer.flush()
    self._flushed = time.monotonic()

  def close(self) -> None:
    self._writer.close()


class _Columns(ProgressColumn):
  """Step, numbers and time left."""

  max_refresh = 0.5

  def render(self, task) -> Text:
    began = task.fields['compiling']
    if began is not None:
      since = _duration(time.perf_counter() - began)
      return Text(f'compiling the training step, {since}')
    left = task.time_remaining
    eta = '-:--:--' if left is None else _duration(left)
    return Text(
      f'{int(task.completed)}/{int(task.total)}  '
      f'{describe(task.fields["record"])}  eta {eta}'
    )


def _duration(seconds: float) -> str:
  seconds = int(seconds)
  return f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'


def _drop_records_after(path: Path, step: int) -> None:
  """Keeps the whole records up to a step; a kill may have cut the last."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(errors='replace').splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (ValueError, KeyError, TypeError):
      continue
  buckets.write(path, ''.join(kept))
