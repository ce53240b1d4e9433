"""The metrics of steps, read one step late, and what follows from them."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qwenvl_jax.data.batches import Batches
from qwenvl_jax.train.coordinator import Coordinator
from qwenvl_jax.train.data_shard import DataShard
from qwenvl_jax.train.guard import LossSpikeDetector, SpikeReport
from qwenvl_jax.train.reporting import Reporter
from qwenvl_jax.train.run_config import TrainConfig
from qwenvl_jax.train.step import COUNTS
from qwenvl_jax.train.stragglers import compare

# Of the notice before a machine is taken away, what waiting for a step may use.
_SHARE_OF_NOTICE = 1 / 3

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

  def times(self, now: float) -> dict[str, float]:
    """What this process did with its time up to now (`time.perf_counter`).

    Returns:
      Seconds a step; of those, what passed otherwise than waiting for the
      devices (`own_seconds`: data and dispatch); the share of waiting for data.
    """
    seconds = max(now - self.began, 1e-9)
    steps = max(self.taken, 1)
    return {
      'step_seconds': seconds / steps,
      'own_seconds': max(seconds - self.settled, 0) / steps,
      'waiting_for_data': self.waited / seconds,
    }

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


class StepMetrics:
  """Reads metrics, reports them, and finds out whether a run is on its course.

  The device works on step k while the host reads the metrics of step k-1 and
  prepares batch k+1: nothing waits for the newest metrics unless it must.

  Attributes:
    spike: why the run has to go back; None while it is on its course.
    long_steps: whether steps take so long that none may be sent off before the
      one before has ended, since SIGTERM can only be obeyed when the device has
      done all it was sent.
  """

  def __init__(
    self,
    config: TrainConfig,
    last: int,
    iterator: Any,
    coordinator: Coordinator,
    shard: DataShard,
    detector: LossSpikeDetector | None,
    reporter: Reporter,
  ):
    """Starts the clock of a run that ends at step `last`."""
    self.spike: SpikeReport | None = None
    self.long_steps = False
    self._config, self._last = config, last
    self._coordinator, self._shard = coordinator, shard
    self._detector, self._reporter = detector, reporter
    # Other iterators than ours count nothing.
    self._batches = iterator if isinstance(iterator, Batches) else None
    self._pending = None
    self._compiled = False
    self._window = Window(time.perf_counter())

  @contextlib.contextmanager
  def waiting_for_data(self) -> Iterator[None]:
    """What takes time within counts as waiting for data."""
    began = time.perf_counter()
    yield
    self._window.waited += time.perf_counter() - began

  @contextlib.contextmanager
  def not_counted(self) -> Iterator[None]:
    """What takes time within is not the training's."""
    began = time.perf_counter()
    yield
    self._window.began += time.perf_counter() - began

  @contextlib.contextmanager
  def compiling(self) -> Iterator[None]:
    """The first time, what takes time within is compiling the step."""
    if self._compiled:
      yield
      return
    began = time.perf_counter()
    self._reporter.compiling()
    with self.not_counted():
      yield
    self._compiled = True
    self._reporter.compiled(time.perf_counter() - began)

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step that was sent off; reads those before."""
    self.settle()
    self._pending = step, metrics

  def settle(self) -> None:
    """Waits for the last step that was sent off, and reads its metrics."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    began = time.perf_counter()
    metrics = jax.device_get(metrics)
    self._window.settled += time.perf_counter() - began
    self._window.add(metrics)
    self._judge(step, metrics)
    if step % self._config.log_every == 0 or step == self._last:
      self._report(step)
    else:
      self._reporter.step(step)

  def restart(self) -> None:
    """Begins anew, after the run went back to an earlier step."""
    self.spike = self._pending = None
    self._window = Window(time.perf_counter())

  def _judge(self, step: int, metrics: dict) -> None:
    """Finds out whether the run is still on its course."""
    if self.spike is not None:
      return  # A step that was sent off before that was known.
    loss = float(metrics['loss'])
    finite = math.isfinite(loss) and math.isfinite(metrics['grad_norm'])
    if self._detector is not None:
      self.spike = self._detector.see(step, loss if finite else math.nan)
    skipped, limit = int(metrics['skipped_in_a_row']), self._config.max_skipped
    if skipped < limit:
      return
    self.spike = SpikeReport(
      step,
      step - skipped,
      f'loss or gradient was not finite in the last {skipped} steps, up to '
      f'step {step} (TrainConfig.max_skipped={limit})',
    )

  def _report(self, step: int) -> None:
    """Writes a record: of all processes what is theirs, summed or compared."""
    mine = {'times': self._window.times(time.perf_counter())}
    if self._shard.first and self._batches is not None:
      mine['data'] = self._batches.sums()
    everyone = self._coordinator.gather(f'the record of step {step}', mine)
    all_times = [x['times'] for x in everyone]
    record = self._window.record(step)
    if self._batches is not None:
      sums = [x['data'] for x in everyone if 'data' in x]
      record |= self._batches.describe(sums)
    compared, remark = compare(all_times, self._coordinator.name)
    self._reporter.record(record | compared, remark)
    self._window = Window(time.perf_counter())
    self._look_at_notice(min(x['step_seconds'] for x in all_times))

  def _look_at_notice(self, step_seconds: float) -> None:
    """Decides, as all processes do, whether steps are waited for."""
    notice, before = self._config.notice, self.long_steps
    self.long_steps = step_seconds > _SHARE_OF_NOTICE * notice
    if step_seconds > notice and not before:
      self._reporter.say(
        f'warning: a step takes {step_seconds:.0f} s, longer than the '
        f'{notice:.0f} s between SIGTERM and the end (TrainConfig.notice): a '
        f'preemption costs up to CheckpointConfig.every='
        f'{self._config.checkpoint.every} steps'
      )
