"""What a run says while it runs: bar or lines, log.jsonl, TensorBoard."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from qwenvl_jax import buckets
from qwenvl_jax.errors import printable
from qwenvl_jax.train.events import Events
from qwenvl_jax.train.log_upload import LogUpload
from qwenvl_jax.train.step import COUNTS

LOG_FILE = 'log.jsonl'
TENSORBOARD = 'tensorboard'

# Metrics of the latest step; everything else is a mean over the window.
_LATEST = ('learning_rate', 'skipped', 'skipped_in_a_row')


@dataclasses.dataclass
class Window:
  """Sums over the steps since the last record: sums add up, means do not."""

  began: float
  waited: float = 0.0
  # Seconds that passed waiting for the devices, and steps whatever their loss.
  settled: float = 0.0
  taken: int = 0
  weight: float = 0.0
  steps: int = 0
  sums: dict[str, float] = dataclasses.field(default_factory=dict)
  latest: dict[str, float] = dataclasses.field(default_factory=dict)

  def add(self, metrics: dict[str, np.ndarray]) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    weight = values.pop('weight')
    self.taken += 1
    self.latest = {name: values.pop(name) for name in _LATEST}
    good = math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])
    for name, value in values.items():
      if name in COUNTS:
        self.sums[name] = self.sums.get(name, 0) + value
      elif good:
        # The gradient's norm is a number a step, the rest a number a label.
        share = 1 if name == 'grad_norm' else weight
        self.sums[name] = self.sums.get(name, 0) + value * share
    if good:
      self.weight += weight
      self.steps += 1

  def record(self, step: int) -> dict[str, float | int | None]:
    seconds = max(time.perf_counter() - self.began, 1e-9)
    record = {'step': step, 'loss': None, 'grad_norm': None}
    for name, value in self.sums.items():
      if name in COUNTS:
        record[name] = int(value)
        record[f'{name}_per_second'] = value / seconds
      else:
        record[name] = value / (
          self.steps if name == 'grad_norm' else self.weight
        )
    record['learning_rate'] = self.latest['learning_rate']
    record['skipped'] = int(self.latest['skipped'])
    record['seconds'] = seconds
    record['waiting_for_data'] = self.waited / seconds
    return record


class Reporter:
  """Writes the records of the process that owns the run's folder."""

  def __init__(self, workdir: Path, start: int, stop: int, quiet=False):
    """Continues the logs of a run.

    Args:
      workdir: the run's folder.
      start: step the run goes on from; later records of an earlier start are
        dropped, they will be written again.
      stop: step the run ends at.
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
    events = self._events = Events(path, start)

    def write(record):
      scalars = {k: v for k, v in record.items() if v is not None}
      events.write(scalars.pop('step'), scalars)

    self._sinks[TENSORBOARD] = write, events.close

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
    for name, (write, _) in list(self._sinks.items()):
      self._attempt(name, lambda write=write: write(finite))
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
    """Notes that the run goes on from an earlier step.

    Args:
      step: whose loss was seen last.
      start: the step it goes on from.
      why: for people.
    """
    self._began = time.perf_counter(), start
    self.say(f'warning: {why}: back to step {start}, leaving out that data')
    if self._quiet:
      return
    record = {'step': start, 'rolled_back_from': step}
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
