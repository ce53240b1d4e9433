"""The run: restore or start, step, report, save, stop."""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from qwenvl_jax import buckets
from qwenvl_jax.conversion import low_rank
from qwenvl_jax.conversion.adapters import base_of, check_base
from qwenvl_jax.conversion.checkpoint_io import CHECKPOINTS
from qwenvl_jax.conversion.families.qwen_vl.assets import (
  VOCABULARY,
  write_assets,
)
from qwenvl_jax.conversion.low_rank import Base
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.data.survey import survey
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError
from qwenvl_jax.sharding import MeshConfig, make_mesh, put_batch
from qwenvl_jax.text.tokenizer import Tokenizer
from qwenvl_jax.train import saved_config
from qwenvl_jax.train.best import FOLDER as BEST
from qwenvl_jax.train.best import Best
from qwenvl_jax.train.checkpoint import CheckpointConfig, Checkpoints
from qwenvl_jax.train.evaluation import Evaluation, note_best
from qwenvl_jax.train.guard import Guard, Spike, Watch
from qwenvl_jax.train.hosts import compare, remark, times
from qwenvl_jax.train.init import InitFrom, initial_params
from qwenvl_jax.train.lock import locked
from qwenvl_jax.train.objective import NextToken, Objective
from qwenvl_jax.train.optimizer import OptimizerConfig, split
from qwenvl_jax.train.peers import Peers
from qwenvl_jax.train.profile import FOLDER as PROFILE
from qwenvl_jax.train.profile import Profiler, check_steps
from qwenvl_jax.train.readers import Reader, find_reader
from qwenvl_jax.train.reporting import Reporter, Window
from qwenvl_jax.train.signals import Caught, Interrupted, caught_signals
from qwenvl_jax.train.state import (
  TrainState,
  abstract_params,
  abstract_state,
  create_state,
)
from qwenvl_jax.train.step import check_batch, compile_loss, compile_step

# Of the notice before a machine is taken away, what waiting for a step may use.
_SHARE_OF_NOTICE = 1 / 3


class Data(Protocol):
  """Where batches come from.

  Attributes:
    batch_size: rows of the global batch.
  """

  batch_size: int

  def iterator(self, process_index: int, process_count: int) -> Any:
    """One part of every batch, in rows: dict name -> NumPy [b,...].

    Which part a process reads, and of how many, is `readers.find_reader`'s.

    The iterator has `get_state` and `set_state` (a Grain `DatasetIterator`, or
    one whose state is bytes).
    """


class DivergedError(QwenVLError):
  """The run cannot find back to a finite loss that stays where it was."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """A loss on data that is not trained on, while training.

  Attributes:
    data: read from its start every time, so that the numbers compare.
    every: steps between two of them.
    batches: how many.
    patience: after how many in a row without a lower loss the run ends, saved;
      the best state so far is in the run's folder `best`. None keeps no best
      state and never ends early.
  """

  data: Data
  every: int = 1000
  batches: int = 8
  patience: int | None = None

  def __post_init__(self):
    for name in ('every', 'batches'):
      if getattr(self, name) < 1:
        raise ConfigError(
          f'HeldOut.{name}={getattr(self, name)} must be at least 1'
        )
    if self.patience is not None and self.patience < 1:
      raise ConfigError(f'HeldOut.patience={self.patience} must be at least 1')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One run.

  Attributes:
    objective: model and loss.
    data: batches.
    optimizer: what is trained, and how fast; its `steps` end the run.
    init: where the first parameters come from; None is at random.
    mesh: how the devices are used.
    checkpoint: when to save.
    accumulation: microbatches a step.
    seed: of what starts random, and of dropout.
    log_every: steps a record.
    max_skipped: consecutive steps without a finite loss that end the run, or
      with a guard, send it back to a checkpoint from before them.
    heldout: see `HeldOut`.
    survey: whether records are counted before the first step: how long they
      are, what of them is cut, and which.
    evaluation: what scores the model on tasks meanwhile, see `Evaluation`.
    guard: when to go back to the last good checkpoint; None is never.
    profile_steps: first and last step, counted from 1, of a profiler trace.
    notice: seconds from SIGTERM to the end of a machine that is taken away, for
      ending the running step and saving. Where steps take more than a third of
      it, none is sent off before the one before has ended.
  """

  objective: Objective
  data: Data
  optimizer: OptimizerConfig
  init: InitFrom | None = InitFrom()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  accumulation: int = 1
  seed: int = 0
  log_every: int = 10
  max_skipped: int = 20
  heldout: HeldOut | None = None
  survey: bool = False
  evaluation: Evaluation | None = None
  guard: Guard | None = None
  profile_steps: tuple[int, int] | None = None
  notice: float = 30.0

  def __post_init__(self):
    if self.profile_steps is not None:
      check_steps(self.profile_steps)
    if not self.notice > 0:
      raise ConfigError(
        f'TrainConfig.notice={self.notice} must be more than 0 seconds'
      )
    if not 0 <= self.seed < 2**32:
      raise ConfigError(
        f'TrainConfig.seed={self.seed} is not from 0 to 2**32 - 1: JAX would '
        'use its last 32 bits, those of another seed'
      )
    for name in ('accumulation', 'log_every', 'max_skipped'):
      if getattr(self, name) < 1:
        raise ConfigError(
          f'TrainConfig.{name}={getattr(self, name)} must be at least 1'
        )


@buckets.refusals_told()
def train(
  config: TrainConfig,
  workdir: str | os.PathLike,
  stop_at: int | None = None,
  resolved: str | None = None,
  peers: Peers | None = None,
) -> TrainState:
  """Trains, resuming from the newest checkpoint in the folder if there is one.

  Args:
    config: see `TrainConfig`.
    workdir: the run's folder, made if absent; or `gs://BUCKET/FOLDER`.
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
  workdir = buckets.as_path(workdir)
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
  first = peers.index == 0
  reader = find_reader(mesh, config.data.batch_size)
  with contextlib.ExitStack() as held:
    check_lock = None
    with _writing(workdir):
      buckets.make_folder(workdir)
      if first:
        check_lock = held.enter_context(locked(workdir, _warn))
      # Orbax clears away in one thread what it lists in another.
      buckets.hold(workdir / CHECKPOINTS)
    return _train(
      config, workdir, stop, resolved, mesh, peers, reader, check_lock
    )


def _train(
  config: TrainConfig,
  workdir: Path,
  stop: int,
  resolved: str | None,
  mesh: Mesh,
  peers: Peers,
  reader: Reader,
  check_lock: Callable[[], None] | None,
) -> TrainState:
  """As `train`, while this process holds the folder's lock."""
  first = peers.index == 0
  iterator = config.data.iterator(reader.index, reader.count)
  # Opening data may take one host long, and collectives know no time-outs.
  peers.gather('the data being open')
  base = _base(config, workdir)
  checkpoints = Checkpoints(
    workdir, config.checkpoint, peers, reader, on_base=base is not None
  )
  watch = Watch(config.guard) if config.guard else None
  with caught_signals() as caught, contextlib.closing(checkpoints):
    state = _start(config, mesh, checkpoints, iterator, watch, first)
    changed = []
    if first:
      # Not before: a configuration that does not fit the run that is there
      # must leave its files alone.
      with _writing(workdir):
        changed = _write_files(config, workdir, resolved, base)
    start = int(state.step)
    reporter = Reporter(workdir, start, stop, quiet=not first)
    with contextlib.closing(reporter):
      if start:
        reporter.say(f'resumed from step {start} of {workdir}')
      for line in changed:
        reporter.say(f'changed since the last start: {line}')
      best = None
      if config.heldout and config.heldout.patience:
        best = Best(workdir, checkpoints.item, first)
        if _no_better(best, config.heldout, start):
          stop = start
      if start >= stop:
        reporter.say(f'nothing left to do: the run ends at step {stop}')
      elif not start and config.survey and isinstance(config.data, Pipeline):
        for found in survey(config.data):
          for line in found.lines():
            reporter.say(line)
          found.check()
      profiler = Profiler(
        workdir / PROFILE, config.profile_steps if first else None, reporter.say
      )
      run = _Run(
        config=config,
        mesh=mesh,
        peers=peers,
        reader=reader,
        checkpoints=checkpoints,
        watch=watch,
        reporter=reporter,
        profiler=profiler,
        caught=caught,
        check_lock=check_lock,
        best=best,
      )
      with contextlib.closing(profiler):
        return run(state, iterator, stop)


def _warn(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:
    reason = buckets.in_bucket(workdir) and buckets.unreachable(error)
    if not reason and not isinstance(error, OSError):
      raise
    raise ConfigError(
      f'cannot write to --workdir {workdir}: {reason or error}'
    ) from error


def _base(config: TrainConfig, workdir: Path) -> Base | None:
  """The model whose frozen parameters a run's checkpoints do not hold.

  Raises:
    CheckpointError: the run was started on another one.
  """
  if config.objective.config.lora is None:
    return None
  folder = buckets.as_path(config.init.params)
  if low_rank.is_ours(workdir):
    _, base = low_rank.read_settings(workdir)
    check_base(base, folder, str(workdir))
    return base
  return base_of(folder)


def _write_files(
  config: TrainConfig, workdir: Path, resolved, base: Base | None
) -> list[str]:
  """Writes what opens the run's checkpoints, and what made them.

  Returns:
    What of the configuration differs from the last start's, a line each.
  """
  folders = [workdir]
  if config.heldout and config.heldout.patience:
    folders.append(workdir / BEST)
  for folder in folders:
    write_assets(folder, config.objective.config)
    if base is not None:
      low_rank.write_settings(folder, config.objective.config.lora, base)
    if isinstance(config.data, Pipeline):
      Tokenizer(config.data.vocabulary).save(folder / VOCABULARY)
  return [] if resolved is None else saved_config.save(workdir, resolved)


def check_run(config: TrainConfig, mesh: Mesh) -> None:
  """Finds what cannot work before anything is read or compiled.

  Raises:
    ConfigError: says what does not fit what, and what would.
  """
  check_batch(config.data.batch_size, config.accumulation, mesh)
  init = config.init or InitFrom()
  if config.objective.config.lora is not None and (
    init.params is None or init.vision or init.adapter or init.decoder
  ):
    raise ConfigError(
      'QwenVLConfig.lora adapts one whole model: name its folder as '
      'InitFrom.params (BASE of finetune/lora.gin), and no other part'
    )
  if config.objective.config.lora is None and init.adapted is not None:
    raise ConfigError(
      'InitFrom.adapted is an adapter to go on from, but QwenVLConfig.lora is '
      'None (finetune/lora.gin sets it)'
    )
  if config.evaluation and jax.process_count() > 1:
    raise ConfigError(
      'TrainConfig.evaluation is for runs of one process; leave it out, and '
      'score the checkpoints of this one with qwenvl-eval'
    )
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


def _start(config, mesh, checkpoints, iterator, watch, first) -> TrainState:
  """The state to go on from."""

  def warn(message):
    if first:
      print(f'warning: {message}', flush=True)

  target = abstract_params(config.objective, config.optimizer, mesh)
  abstract = abstract_state(target, config.optimizer, mesh)
  on_base, params = config.objective.config.lora is not None, None

  def initial():
    init = config.init or InitFrom()
    return initial_params(config.objective, target, init, config.seed)

  if on_base:
    params = initial()
    _, frozen = split(params, config.optimizer)
    abstract = dataclasses.replace(abstract, frozen=frozen)
  state = checkpoints.restore(abstract, iterator, warn, watch)
  if state is not None:
    return state
  return create_state(params or initial(), config.optimizer, mesh)


@dataclasses.dataclass
class _Run:
  """The loop over steps.

  The device works on step k while the host reads the metrics of step k-1 and
  prepares batch k+1: nothing here waits for the newest metrics but saving. Long
  steps are waited for, since SIGTERM can only be obeyed when the device has
  done all it was sent.
  """

  config: TrainConfig
  mesh: Mesh
  peers: Peers
  reader: Reader
  checkpoints: Checkpoints
  watch: Watch | None
  reporter: Reporter
  profiler: Profiler
  caught: Caught
  check_lock: Callable[[], None] | None
  best: Best | None = None

  def __call__(self, state: TrainState, iterator, stop: int) -> TrainState:
    config = self.config
    self._iterator = iterator
    self._pending = None
    self._spike = None
    self._long_steps = False
    self._stop = stop
    # Counts on where the number of the step goes back.
    turn = step_number = int(state.step)
    step = compile_step(
      config.objective,
      config.optimizer,
      config.accumulation,
      self.mesh,
      state,
      config.seed,
    )
    self._heldout_loss = None
    if config.heldout:
      self._heldout_loss = compile_loss(
        config.objective, self.mesh, state.params
      )
    self._window = Window(time.perf_counter())
    compiled = False
    while step_number < stop:
      self.peers.check()
      self.peers.at(turn)
      self._stop_if_asked(turn, step_number, state)
      with self.profiler.step(step_number + 1):
        began = time.perf_counter()
        batch = self._put(_next(iterator, step_number, stop))
        dispatched = time.perf_counter()
        self._window.waited += dispatched - began
        state, metrics = step(state, batch)
      step_number += 1
      turn += 1
      if not compiled:
        compiled = True
        seconds = time.perf_counter() - dispatched
        self.reporter.compiled(seconds)
        self._window.began += seconds
      self._settle()
      self._pending = step_number, metrics
      self.profiler.after(step_number, metrics)
      self.checkpoints.check()
      heldout = config.heldout and step_number % config.heldout.every == 0
      evaluation = config.evaluation
      scoring = evaluation and step_number % evaluation.every == 0
      saving = (
        self.checkpoints.due(step_number) or step_number == stop or scoring
      )
      if heldout or saving or self._long_steps:
        self._settle()
      if self._spike is not None:
        sent_after = step_number - self._spike.step
        state = self._go_back(state)
        step_number = int(state.step)
        if not sent_after:
          # Whether a step was sent off after the spike's depends on the clock;
          # which data are left out must not.
          _next(iterator, step_number, stop)
        continue
      ending = heldout and self._report_heldout(step_number, state)
      if scoring:
        self._report_scores(step_number, state)
      if saving or ending:
        self._save(step_number, state)
      if ending:
        self.reporter.say(
          f'ended at step {step_number}: the held-out loss has not been lower '
          f'than {self.best.loss:.4f} since step {self.best.step} '
          '(HeldOut.patience)'
        )
        break
    self.checkpoints.finish()
    return state

  def _put(self, batch: dict) -> dict:
    check = getattr(self.config.objective, 'check', None)
    if check is not None:
      check(batch)
    return put_batch(batch, self.mesh)

  def _save(self, step_number: int, state: TrainState) -> None:
    if self.check_lock is not None:
      self.check_lock()
    # Whoever goes on from this step finds the records up to it.
    self.reporter.flush()
    self.checkpoints.save(step_number, state, self._iterator, self.watch)

  def _settle(self) -> None:
    """Reads the metrics of the last step that was sent off."""
    if self._pending is None:
      return
    step_number, metrics = self._pending
    self._pending = None
    began = time.perf_counter()
    metrics = jax.device_get(metrics)
    self._window.settled += time.perf_counter() - began
    self._window.add(metrics)
    self._judge(step_number, metrics)
    if step_number % self.config.log_every == 0 or step_number == self._stop:
      self._report(step_number)
    else:
      self.reporter.step(step_number)

  def _report(self, step_number: int) -> None:
    """Writes a record: of all processes what is theirs, summed or compared."""
    mine = {'times': times(self._window, time.perf_counter())}
    if self.reader.first and hasattr(self._iterator, 'sums'):
      mine['data'] = self._iterator.sums()
    everyone = self.peers.gather(f'the record of step {step_number}', mine)
    all_times = [x['times'] for x in everyone]
    record = self._window.record(step_number)
    if hasattr(self._iterator, 'sums'):
      sums = [x['data'] for x in everyone if 'data' in x]
      record |= self._iterator.describe(sums)
    compared = compare(all_times)
    self.reporter.record(
      record | compared, remark(compared, all_times, self.peers.name)
    )
    self._window = Window(time.perf_counter())
    self._look_at_notice(min(x['step_seconds'] for x in all_times))

  def _look_at_notice(self, step_seconds: float) -> None:
    """Decides, as all processes do, whether steps are waited for."""
    notice, before = self.config.notice, self._long_steps
    self._long_steps = step_seconds > _SHARE_OF_NOTICE * notice
    if step_seconds > notice and not before:
      self.reporter.say(
        f'warning: a step takes {step_seconds:.0f} s, longer than the '
        f'{notice:.0f} s between SIGTERM and the end (TrainConfig.notice): a '
        f'preemption costs up to CheckpointConfig.every='
        f'{self.config.checkpoint.every} steps'
      )

  def _judge(self, step_number: int, metrics: dict) -> None:
    """Finds out whether the run is still on its course."""
    loss = float(metrics['loss'])
    finite = math.isfinite(loss) and math.isfinite(metrics['grad_norm'])
    if self.watch is not None and self._spike is None:
      self._spike = self.watch.see(step_number, loss if finite else math.nan)
    skipped = int(metrics['skipped_in_a_row'])
    if skipped < self.config.max_skipped:
      return
    said = (
      f'loss or gradient was not finite in the last {skipped} steps, up to '
      f'step {step_number} (TrainConfig.max_skipped={self.config.max_skipped})'
    )
    if self.watch is None:
      raise DivergedError(
        f'{said}; the last checkpoint is of step {self.checkpoints.newest}. '
        'Lower OptimizerConfig.peak, look at the data of these steps, or raise '
        'TrainConfig.max_skipped'
      )
    self._spike = Spike(step_number, step_number - skipped, said)

  def _go_back(self, state: TrainState) -> TrainState:
    """The state of the last good checkpoint; the data stay where they are.

    So what was read since that checkpoint is left out, and one batch more.
    """
    spike, self._spike, self._pending = self._spike, None, None
    limit, rollbacks = self.config.guard.limit, self.watch.rollbacks
    if rollbacks >= limit:
      raise DivergedError(
        f'{spike.said}, after {rollbacks} roll-backs (Guard.limit={limit}). '
        'Lower OptimizerConfig.peak or look at the data; Guard.sigmas, '
        'Guard.rise and Guard.steps say what counts as a spike'
      )
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
    target = dataclasses.replace(target, frozen=state.frozen)
    restored = self.checkpoints.go_back(
      spike.good, target, self.reporter.say, self.watch
    )
    if restored is None:
      raise DivergedError(
        f'{spike.said}, and no checkpoint is from before: the first good step '
        f'to go back to would be {spike.good} or earlier. Save more often '
        '(CheckpointConfig.every) or lower OptimizerConfig.peak'
      )
    self.watch.rollbacks = rollbacks + 1
    self.reporter.rolled_back(spike.step, int(restored.step), spike.said)
    self._window = Window(time.perf_counter())
    return restored

  def _report_heldout(self, step_number: int, state: TrainState) -> bool:
    """Computes the loss on held-out data; whether the run ends by it."""
    heldout, reader = self.config.heldout, self.reader
    iterator = heldout.data.iterator(reader.index, reader.count)
    began = time.perf_counter()
    total = weight = 0.0
    params = state.params
    for _ in range(heldout.batches):
      batch = next(iterator, None)
      if batch is None:
        break
      sums = self._heldout_loss(params, self._put(batch))
      loss, weight_here = jax.device_get(sums)
      total, weight = total + float(loss), weight + float(weight_here)
    loss = total / weight if weight else float('nan')
    self.reporter.record({'step': step_number, 'heldout_loss': loss})
    if self.best is not None:
      self.best.see(step_number, loss, self.checkpoints.held(state).params)
    # This time is not the training's.
    self._window.began += time.perf_counter() - began
    return _no_better(self.best, heldout, step_number)

  def _report_scores(self, step_number: int, state: TrainState) -> None:
    workdir, began = self.checkpoints.folder.parent, time.perf_counter()
    scores = self.config.evaluation(
      self.config.objective.config, state.params, workdir
    )
    record = {f'eval/{name}': score for name, score in scores.items()}
    self.reporter.record(
      {'step': step_number} | record, note_best(workdir, step_number, scores)
    )
    self._window.began += time.perf_counter() - began

  def _stop_if_asked(self, turn, step_number, state) -> None:
    asked = self.caught.signum
    if self.peers.count > 1:
      # All processes must save the same step; the runtime agrees on one.
      asked = signal.SIGTERM * self.checkpoints.preempted(turn)
    if not asked:
      return
    name = signal.Signals(asked).name
    self._settle()
    if self._spike is not None:
      # What would be saved is bad: the run goes on from before.
      step_number = self.checkpoints.newest
    elif step_number and step_number != self.checkpoints.newest:
      self._save(step_number, state)
    self.checkpoints.finish()
    raise Interrupted(
      f'stopped by {name} at step {step_number}, which is saved in '
      f'{self.checkpoints.folder}; start the same command again to go on'
      if step_number
      else f'stopped by {name} before the first step',
      asked,
    )


def _no_better(best: Best | None, heldout: HeldOut, step: int) -> bool:
  """Whether the held-out loss has not become lower for long enough."""
  if best is None or not best.step:
    return False
  return step - best.step >= heldout.patience * heldout.every


def _next(iterator: Iterator, step_number: int, stop: int) -> dict:
  try:
    return next(iterator)
  except StopIteration:
    raise DataError(
      f'the data ended after {step_number} of {stop} steps: let the sources '
      'repeat, or lower OptimizerConfig.steps'
    ) from None
