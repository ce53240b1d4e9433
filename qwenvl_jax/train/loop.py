"""The run: restore or start, step, report, save, stop."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qwenvl_jax import buckets
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.data.survey import survey
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.sharding import make_mesh, put_batch
from qwenvl_jax.train import run_folder
from qwenvl_jax.train.best import BestState
from qwenvl_jax.train.checkpoint import Checkpoints
from qwenvl_jax.train.coordinator import Coordinator
from qwenvl_jax.train.data_shard import find_data_shard
from qwenvl_jax.train.guard import (
  DivergedError,
  Guard,
  LossSpikeDetector,
  SpikeReport,
)
from qwenvl_jax.train.heldout import HeldOut, heldout_loss
from qwenvl_jax.train.init import InitFrom, initial_params
from qwenvl_jax.train.optimizer import split
from qwenvl_jax.train.profile import FOLDER as PROFILE
from qwenvl_jax.train.profile import Profiler
from qwenvl_jax.train.reporting import Reporter
from qwenvl_jax.train.run_config import PREFIX, TrainConfig, check_run
from qwenvl_jax.train.signals import Interrupted, caught_signals
from qwenvl_jax.train.state import (
  TrainState,
  abstract_params,
  abstract_state,
  create_state,
)
from qwenvl_jax.train.step import compile_step
from qwenvl_jax.train.step_metrics import StepMetrics

# What config files name as `loop.TrainConfig` and so on.
__all__ = ['DivergedError', 'HeldOut', 'TrainConfig', 'train']


@buckets.refusals_told()
def train(
  config: TrainConfig,
  workdir: str | os.PathLike,
  stop_at: int | None = None,
  resolved: str | None = None,
  coordinator: Coordinator | None = None,
) -> TrainState:
  """Trains, resuming from the newest checkpoint in the folder if there is one.

  Args:
    config: see `TrainConfig`.
    workdir: the run's folder, made if absent; or `gs://BUCKET/FOLDER`.
    stop_at: end (and save) at this step instead of `config.optimizer.steps`;
      the schedule stays as it is, and a later call goes on.
    resolved: the configuration as a config file, to be kept as `config.gin`.
    coordinator: of the processes of this run, from `processes.joined`.

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
  coordinator = coordinator or Coordinator()
  first = coordinator.index == 0
  mesh = make_mesh(config.mesh)
  check_run(config, mesh, coordinator)
  last = _last_step(config, stop_at)
  shard = find_data_shard(mesh, config.data.batch_size)
  with contextlib.ExitStack() as stack:
    check_lock = stack.enter_context(run_folder.opened(workdir, first))
    iterator = config.data.iterator(shard.index, shard.count)
    # Opening data may take one host long, and collectives know no time-outs.
    coordinator.gather('the data being open')
    base = run_folder.find_base(config, workdir)
    caught = stack.enter_context(caught_signals())

    def closed_at_end(thing):
      return stack.enter_context(contextlib.closing(thing))

    checkpoints = closed_at_end(
      Checkpoints(
        workdir, config.checkpoint, coordinator, shard, on_base=bool(base)
      )
    )
    detector = LossSpikeDetector(config.guard) if config.guard else None
    state = _restored(config, mesh, checkpoints, iterator, detector, first)
    # Not before: a configuration that does not fit the run that is there must
    # leave its files alone.
    changed = []
    if first:
      changed = run_folder.write_files(config, workdir, resolved, base)
    start = step = turn = int(state.step)

    reporter = closed_at_end(Reporter(workdir, start, last, quiet=not first))
    best = None
    if config.measure:
      best = closed_at_end(
        BestState(
          workdir, config.measure, checkpoints.item, coordinator, reporter.say
        )
      )
      if _out_of_patience(config, best, start):
        last = start
    _say_how_it_starts(config, workdir, start, last, changed, reporter)
    profiled = config.profile_steps if first else None
    profiler = closed_at_end(
      Profiler(workdir / PROFILE, profiled, reporter.say)
    )
    metrics = StepMetrics(
      config, last, iterator, coordinator, shard, detector, reporter
    )

    def finish() -> None:
      """Waits for what is being saved: Orbax saves one thing at a time."""
      checkpoints.finish()
      if best:
        best.finish()

    def note(step: int, state: TrainState, found: dict[str, float]) -> None:
      """Reports measures of a state, which may be the best so far."""
      said = ''
      if best:
        finish()
        params = checkpoints.held(state).params
        said = best.offer(step, found, params)
        found = found | best.record()
      reporter.record({'step': step} | found, said)

    def report_heldout(step: int, state: TrainState) -> None:
      with metrics.not_counted():
        note(step, state, {'heldout_loss': compute_loss(state.params)})

    def report_scores(step: int, state: TrainState) -> None:
      with metrics.not_counted():
        model = config.objective.config
        scores = config.evaluation(model, state.params, workdir)
        found = {PREFIX + name: score for name, score in scores.items()}
        if best:
          best.check_measured(found)
        note(step, state, found)

    def save(step: int, state: TrainState) -> None:
      check_lock()
      # Whoever goes on from this step finds the records up to it.
      reporter.flush()
      finish()
      checkpoints.save(step, state, iterator, detector)

    hooks: list[tuple[int, Callable[[int, TrainState], None]]] = []
    if config.heldout:
      compute_loss = heldout_loss(
        config.heldout, config.objective, mesh, shard, state.params
      )
      hooks.append((config.heldout.every, report_heldout))
    if config.evaluation:
      hooks.append((config.evaluation.every, report_scores))
    hooks.append((config.checkpoint.every, save))

    train_step = compile_step(
      config.objective,
      config.optimizer,
      config.accumulation,
      mesh,
      state,
      config.seed,
    )
    while step < last:
      coordinator.check()
      # Turns count on where the number of the step goes back.
      coordinator.heartbeat(turn)
      asked = caught.signum
      if coordinator.count > 1:
        # All processes must save the same step; the runtime agrees on one.
        asked = signal.SIGTERM * checkpoints.manager.reached_preemption(turn)
      if asked:
        metrics.settle()
        if metrics.spike:
          # What would be saved is bad: the run goes on from before.
          step = checkpoints.newest
        elif step:
          save(step, state)
        finish()
        raise _interrupted(asked, step, checkpoints.folder)

      with profiler.step(step + 1):
        with metrics.waiting_for_data():
          batch = _next(iterator, step, last)
          config.objective.check(batch)
          batch = put_batch(batch, mesh)
        with metrics.compiling():
          state, values = train_step(state, batch)
      step, turn = step + 1, turn + 1
      metrics.add(step, values)
      profiler.after(step, values)
      checkpoints.check()
      if best:
        best.check()

      # The end of the run is measured, too: it may be the best.
      ended = step == config.optimizer.steps
      due = [hook for every, hook in hooks if ended or step % every == 0]
      if due or step == last or metrics.long_steps:
        metrics.settle()
      if metrics.spike:
        spike = metrics.spike
        state = _roll_back(
          config.guard, spike, state, checkpoints, detector, reporter
        )
        metrics.restart()
        if step == spike.step:
          # Whether a step was sent off after the spike's depends on the clock;
          # which data are left out must not.
          _next(iterator, step, last)
        step = int(state.step)
        continue
      for hook in due:
        hook(step, state)
      if _out_of_patience(config, best, step):
        reporter.say(
          f'ended at step {step}: no {best.measure} has been better than '
          f'{best.value:.4f} since step {best.step} (HeldOut.patience)'
        )
        break
    save(step, state)
    finish()
    return state


def _last_step(config: TrainConfig, stop_at: int | None) -> int:
  if stop_at is None:
    return config.optimizer.steps
  if stop_at < 1:
    raise ConfigError(f'--steps {stop_at}: at least one step must be taken')
  return min(stop_at, config.optimizer.steps)


def _restored(
  config: TrainConfig,
  mesh: Mesh,
  checkpoints: Checkpoints,
  iterator: Any,
  detector: LossSpikeDetector | None,
  first: bool,
) -> TrainState:
  """The state to go on from: the newest saved, or the first of all."""

  def warn(message):
    if first:
      print(f'warning: {message}', flush=True)

  target = abstract_params(config.objective, config.optimizer, mesh)
  abstract = abstract_state(target, config.optimizer, mesh)
  params = None

  def initial():
    init = config.init or InitFrom()
    return initial_params(config.objective, target, init, config.seed)

  if config.objective.config.lora is not None:
    params = initial()
    _, frozen = split(params, config.optimizer)
    abstract = dataclasses.replace(abstract, frozen=frozen)
  state = checkpoints.restore(abstract, iterator, warn, detector)
  if state is not None:
    return state
  return create_state(params or initial(), config.optimizer, mesh)


def _say_how_it_starts(
  config: TrainConfig,
  workdir: Path,
  start: int,
  last: int,
  changed: list[str],
  reporter: Reporter,
) -> None:
  if start:
    reporter.say(f'resumed from step {start} of {workdir}')
  for line in changed:
    reporter.say(f'changed since the last start: {line}')
  if start >= last:
    reporter.say(f'nothing left to do: the run ends at step {last}')
  elif not start and config.survey and isinstance(config.data, Pipeline):
    for found in survey(config.data):
      for line in found.lines():
        reporter.say(line)
      found.check()


def _out_of_patience(
  config: TrainConfig, best: BestState | None, step: int
) -> bool:
  """Whether no state has been better for long enough."""
  patience = config.heldout and config.heldout.patience
  return bool(
    best
    and patience
    and best.stands_since(patience * config.measured_every, step)
  )


def _roll_back(
  guard: Guard | None,
  spike: SpikeReport,
  state: TrainState,
  checkpoints: Checkpoints,
  detector: LossSpikeDetector | None,
  reporter: Reporter,
) -> TrainState:
  """Restores the last good checkpoint; the data stay where they are.

  So what was read since that checkpoint is left out.

  Raises:
    DivergedError: there is no guard, nothing to restore, or it has been done
      too often.
  """
  if guard is None:
    raise DivergedError(
      f'{spike.said}; the last checkpoint is of step {checkpoints.newest}. '
      'Lower OptimizerConfig.peak, look at the data of these steps, or raise '
      'TrainConfig.max_skipped'
    )
  rollbacks = detector.rollbacks
  if rollbacks >= guard.limit:
    raise DivergedError(
      f'{spike.said}, after {rollbacks} roll-backs (Guard.limit='
      f'{guard.limit}). Lower OptimizerConfig.peak or look at the data; '
      'Guard.sigmas, Guard.rise and Guard.steps say what counts as a spike'
    )
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  target = dataclasses.replace(target, frozen=state.frozen)
  restored = checkpoints.go_back(spike.good, target, reporter.say, detector)
  if restored is None:
    raise DivergedError(
      f'{spike.said}, and no checkpoint is from before: the first good step '
      f'to go back to would be {spike.good} or earlier. Save more often '
      '(CheckpointConfig.every) or lower OptimizerConfig.peak'
    )
  detector.rollbacks = rollbacks + 1
  reporter.rolled_back(spike.step, int(restored.step), spike.said)
  return restored


def _interrupted(signum: int, step: int, folder: Path) -> Interrupted:
  name = signal.Signals(signum).name
  return Interrupted(
    f'stopped by {name} at step {step}, which is saved in {folder}; start the '
    'same command again to go on'
    if step
    else f'stopped by {name} before the first step',
    signum,
  )


def _next(iterator: Iterator, step: int, last: int) -> dict:
  try:
    return next(iterator)
  except StopIteration:
    raise DataError(
      f'the data ended after {step} of {last} steps: let the sources repeat, '
      'or lower OptimizerConfig.steps'
    ) from None
