"""How a run that has left its course goes back to before."""

import dataclasses

import jax

from qwenvl_jax.train.checkpoint import Checkpoints
from qwenvl_jax.train.guard import (
  DivergedError,
  Guard,
  LossSpikeDetector,
  SpikeReport,
)
from qwenvl_jax.train.reporting import Reporter
from qwenvl_jax.train.state import TrainState


def roll_back(
  guard: Guard | None,
  spike: SpikeReport,
  state: TrainState,
  checkpoints: Checkpoints,
  detector: LossSpikeDetector | None,
  reporter: Reporter,
) -> TrainState:
  """Restores the last good checkpoint; the data stay where they are.

  So what was read since that checkpoint is left out.

  Args:
    guard: says how often; None never goes back.
    spike: why.
    state: the bad one, whose shapes and frozen parameters are taken over.
    checkpoints: of the run.
    detector: gets the state that was saved, and counts.
    reporter: told.

  Returns:
    The state.

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
