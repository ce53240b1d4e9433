"""The metrics of steps, read one step late, and what follows from them."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from qwenvl_jax.data.batches import Batches
from qwenvl_jax.train.coordinator import Coordinator
from qwenvl_jax.train.data_shard import DataShard
from qwenvl_jax.train.guard import LossSpikeDetector, SpikeReport
from qwenvl_jax.train.reporting import Reporter, Window
from qwenvl_jax.train.run_config import TrainConfig
from qwenvl_jax.train.stragglers import compare, remark, times

# Of the notice before a machine is taken away, what waiting for a step may use.
_SHARE_OF_NOTICE = 1 / 3


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
    """Starts the clock.

    Args:
      config: of the run.
      last: the step that the run ends at.
      iterator: of the data, for its counts.
      coordinator: of the processes of the run.
      shard: the part of the data that this process reads.
      detector: of loss spikes; None never goes back.
      reporter: gets a record every `log_every` steps.
    """
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
    mine = {'times': times(self._window, time.perf_counter())}
    if self._shard.first and self._batches is not None:
      mine['data'] = self._batches.sums()
    everyone = self._coordinator.gather(f'the record of step {step}', mine)
    all_times = [x['times'] for x in everyone]
    record = self._window.record(step)
    if self._batches is not None:
      sums = [x['data'] for x in everyone if 'data' in x]
      record |= self._batches.describe(sums)
    compared = compare(all_times)
    self._reporter.record(
      record | compared, remark(compared, all_times, self._coordinator.name)
    )
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
