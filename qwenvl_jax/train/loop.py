"""The run: restore or start, step, report, save, stop."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from qwenvl_jax.conversion.folder import VOCABULARY, write_side_files
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError
from qwenvl_jax.sharding import MeshConfig, make_mesh, put_batch
from qwenvl_jax.text.tokenizer import Tokenizer
from qwenvl_jax.train.checkpoint import CheckpointConfig, Checkpoints
from qwenvl_jax.train.init import InitFrom, initial_params
from qwenvl_jax.train.objective import NextToken, Objective
from qwenvl_jax.train.optimizer import OptimizerConfig
from qwenvl_jax.train.peers import Peers
from qwenvl_jax.train.reporting import Reporter, Window
from qwenvl_jax.train.signals import Interrupted, caught_signals
from qwenvl_jax.train.state import (
  TrainState,
  abstract_params,
  abstract_state,
  create_state,
)
from qwenvl_jax.train.step import check_batch, compile_loss, compile_step

# The resolved configuration, beside the checkpoints.
CONFIG = 'config.gin'


class Data(Protocol):
  """Where batches come from.

  Attributes:
    batch_size: rows of the global batch.
  """

  batch_size: int

  def iterator(self, process_index: int, process_count: int) -> Any:
    """This process's rows of every batch: dict name -> NumPy [b,...].

    The iterator has `get_state` and `set_state` (a Grain `DatasetIterator`, or
    one whose state is bytes).
    """


class DivergedError(QwenVLError):
  """Loss or gradient stayed not finite."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A loss on data that is not trained on, while training.

  Attributes:
    data: read from its start every time, so that the numbers compare.
    every: steps between two of them.
    batches: how many.
  """

  data: Data
  every: int = 1000
  batches: int = 8


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One run.

  Attributes:
    objective: model and loss.
    data: batches.
    optimizer: what is trained, and how fast; its `steps` end the run.
    init: where the first parameters come from.
    mesh: how the devices are used.
    checkpoint: when to save.
    accumulation: microbatches a step.
    seed: of what starts random.
    log_every: steps a record.
    max_skipped: consecutive steps without a finite loss that end the run.
    heldout: see `HeldOut`.
  """

  objective: Objective
  data: Data
  optimizer: OptimizerConfig
  init: InitFrom = InitFrom()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  accumulation: int = 1
  seed: int = 0
  log_every: int = 10
  max_skipped: int = 20
  heldout: HeldOut | None = None

  def __post_init__(self):
    for name in ('accumulation', 'log_every', 'max_skipped'):
      if getattr(self, name) < 1:
        raise ConfigError(
          f'TrainConfig.{name}={getattr(self, name)} must be at least 1'
        )


def train(
  config: TrainConfig,
  workdir: str | Path,
  stop_at: int | None = None,
  resolved: str | None = None,
  peers: Peers | None = None,
) -> TrainState:
  """Trains, resuming from the newest checkpoint in the folder if there is one.

  Args:
    config: see `TrainConfig`.
    workdir: the run's folder, made if absent.
    stop_at: end (and save) at this step instead of `config.optimizer.steps`;
      the schedule stays as it is, and a later call goes on.
    resolved: the configuration as a config file, to be kept as `config.gin`.
    peers: the processes of this run, from `processes.joined`.

  Returns:
    The last state.

  Raises:
    ConfigError: the configuration cannot run on these devices.
    CheckpointError: nothing to start from, or saving failed.
    DataError: the data ended early.
    DivergedError: see `TrainConfig.max_skipped`.
    Interrupted: SIGTERM or SIGINT came; the state has been saved.
  """
  workdir = Path(workdir)
  peers = peers or Peers()
  if peers.count != jax.process_count():
    raise ConfigError(
      f'this is one of {jax.process_count()} processes: join them with '
      '`qwenvl_jax.train.processes.joined` and pass on what it gives'
    )
  mesh = make_mesh(config.mesh)
  check_run(config, mesh)
  stop = config.optimizer.steps
  if stop_at is not None and stop_at < 1:
    raise ConfigError(f'--steps {stop_at}: at least one step must be taken')
  stop = stop if stop_at is None else min(stop_at, stop)
  first = jax.process_index() == 0
  with _writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  iterator = config.data.iterator(jax.process_index(), jax.process_count())
  checkpoints = Checkpoints(workdir, config.checkpoint)
  with caught_signals() as caught, contextlib.closing(checkpoints):
    state = _start(config, mesh, checkpoints, iterator, first)
    if first:
      # Not before: a configuration that does not fit the run that is there
      # must leave its files alone.
      with _writing(workdir):
        _write_files(config, workdir, resolved)
    start = int(state.step)
    reporter = Reporter(workdir, start, stop, quiet=not first)
    with contextlib.closing(reporter):
      if start:
        reporter.say(f'resumed from step {start} of {workdir}')
      if start >= stop:
        reporter.say(f'nothing left to do: the run ends at step {stop}')
      run = _Run(config, mesh, checkpoints, reporter, caught)
      return run(state, iterator, stop)


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ConfigError(
      f'cannot write to --workdir {workdir}: {error}'
    ) from error


def _write_files(config: TrainConfig, workdir: Path, resolved) -> None:
  """Writes what opens the run's checkpoints, and what made them."""
  write_side_files(workdir, config.objective.config, None)
  if isinstance(config.data, Pipeline):
    Tokenizer(config.data.vocabulary).save(workdir / VOCABULARY)
  if resolved is not None:
    (workdir / CONFIG).write_text(resolved)


def check_run(config: TrainConfig, mesh: Mesh) -> None:
  """Finds what cannot work before anything is read or compiled.

  Raises:
    ConfigError: says what does not fit what, and what would.
  """
  check_batch(config.data.batch_size, config.accumulation, mesh)
  data, objective = config.data, config.objective
  if not (isinstance(data, Pipeline) and isinstance(objective, NextToken)):
    return
  model = objective.config
  tokenizer = Tokenizer(data.vocabulary)
  vocabulary = data.vocabulary or 'the released vocabulary'
  if data.image_tokens != model.adapter.queries:
    raise ConfigError(
      f'Pipeline.image_tokens={data.image_tokens} differs from '
      f'AdapterConfig.queries={model.adapter.queries}: every query fills one '
      'place of an image span, so both must be equal'
    )
  if tokenizer.vocab_size > model.decoder.vocab_size:
    raise ConfigError(
      f'{vocabulary} has {tokenizer.vocab_size} ids, more than '
      f'DecoderConfig.vocab_size={model.decoder.vocab_size}: raise that to at '
      f'least {tokenizer.vocab_size}, or name the vocabulary of this model'
    )
  if tokenizer.img_start_id != model.image_start_id:
    raise ConfigError(
      f'<img> is id {tokenizer.img_start_id} in {vocabulary}, but '
      f'QwenVLConfig.image_start_id={model.image_start_id}'
    )
  patch = model.vision.patch_size
  if data.image_size % patch:
    near = data.image_size // patch * patch
    raise ConfigError(
      f'Pipeline.image_size={data.image_size} is not a multiple of '
      f'VisionConfig.patch_size={patch}: take {near} or {near + patch}'
    )


def _start(config, mesh, checkpoints, iterator, first) -> TrainState:
  """The state to go on from."""

  def warn(message):
    if first:
      print(f'warning: {message}', flush=True)

  target = abstract_params(config.objective, config.optimizer, mesh)
  abstract = abstract_state(target, config.optimizer, mesh)
  state = checkpoints.restore(abstract, iterator, warn)
  if state is not None:
    return state
  params = initial_params(config.objective, target, config.init, config.seed)
  return create_state(params, config.optimizer, mesh)


class _Run:
  """The loop over steps.

  The device works on step k while the host reads the metrics of step k-1 and
  prepares batch k+1: nothing here waits for the newest metrics but saving.
  """

  def __init__(self, config, mesh, checkpoints, reporter, caught):
    self._config = config
    self._mesh = mesh
    self._checkpoints = checkpoints
    self._reporter = reporter
    self._caught = caught
    self._pending = None
    self._window = None
    self._data_metrics = dict

  def __call__(self, state: TrainState, iterator, stop: int) -> TrainState:
    config = self._config
    self._data_metrics = getattr(iterator, 'metrics', dict)
    step_number = int(state.step)
    step = compile_step(
      config.objective, config.optimizer, config.accumulation, self._mesh, state
    )
    self._heldout_loss = None
    if config.heldout:
      self._heldout_loss = compile_loss(
        config.objective, self._mesh, state.params
      )
    self._window = Window(time.perf_counter())
    compiled = False
    while step_number < stop:
      self._stop_if_asked(step_number, state, iterator)
      began = time.perf_counter()
      batch = put_batch(_next(iterator, step_number, stop), self._mesh)
      dispatched = time.perf_counter()
      self._window.waited += dispatched - began
      state, metrics = step(state, batch)
      step_number += 1
      if not compiled:
        compiled = True
        seconds = time.perf_counter() - dispatched
        self._reporter.compiled(seconds)
        self._window.began += seconds
      self._settle(stop)
      self._pending = step_number, metrics
      self._checkpoints.check()
      if config.heldout and step_number % config.heldout.every == 0:
        self._settle(stop)
        self._report_heldout(step_number, state)
      if self._checkpoints.due(step_number) or step_number == stop:
        self._settle(stop)
        self._checkpoints.save(step_number, state, iterator)
    self._settle(stop)
    self._checkpoints.finish()
    return state

  def _settle(self, stop: int) -> None:
    """Reads the metrics of the last step that was sent off."""
    if self._pending is None:
      return
    step_number, metrics = self._pending
    self._pending = None
    metrics = jax.device_get(metrics)
    self._window.add(metrics)
    if metrics['skipped_in_a_row'] >= self._config.max_skipped:
      raise DivergedError(
        f'loss or gradient was not finite in the last '
        f'{int(metrics["skipped_in_a_row"])} steps, up to step {step_number} '
        f'(TrainConfig.max_skipped={self._config.max_skipped}); the last '
        f'checkpoint is of step {self._checkpoints.newest}. Lower '
        'OptimizerConfig.peak, look at the data of these steps, or raise '
        'TrainConfig.max_skipped'
      )
    if step_number % self._config.log_every == 0 or step_number == stop:
      self._reporter.record(
        self._window.record(step_number) | self._data_metrics()
      )
      self._window = Window(time.perf_counter())
    else:
      self._reporter.step(step_number)

  def _report_heldout(self, step_number: int, state: TrainState) -> None:
    heldout = self._config.heldout
    iterator = heldout.data.iterator(jax.process_index(), jax.process_count())
    began = time.perf_counter()
    total = weight = 0.0
    params = state.params
    for _ in range(heldout.batches):
      batch = next(iterator, None)
      if batch is None:
        break
      sums = self._heldout_loss(params, put_batch(batch, self._mesh))
      loss, weight_here = jax.device_get(sums)
      total, weight = total + float(loss), weight + float(weight_here)
    loss = total / weight if weight else float('nan')
    self._reporter.record({'step': step_number, 'heldout_loss': loss})
    # This time is not the training's.
    self._window.began += time.perf_counter() - began

  def _stop_if_asked(self, step_number, state, iterator) -> None:
    asked = self._caught.signum
    if jax.process_count() > 1:
      # All processes must save the same step; the runtime agrees on one.
      asked = signal.SIGTERM * self._checkpoints.preempted(step_number)
    if not asked:
      return
    name = signal.Signals(asked).name
    if step_number and step_number != self._checkpoints.newest:
      self._checkpoints.save(step_number, state, iterator)
    self._checkpoints.finish()
    raise Interrupted(
      f'stopped by {name} at step {step_number}, which is saved in '
      f'{self._checkpoints.folder}; start the same command again to go on'
      if step_number
      else f'stopped by {name} before the first step',
      asked,
    )


def _next(iterator: Iterator, step_number: int, stop: int) -> dict:
  try:
    return next(iterator)
  except StopIteration:
    raise DataError(
      f'the data ended after {step_number} of {stop} steps: let the sources '
      'repeat, or lower OptimizerConfig.steps'
    ) from None
