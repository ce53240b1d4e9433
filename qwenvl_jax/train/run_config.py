"""The configuration of a run, and what of it cannot work."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.errors import ConfigError, check_at_least_1, check_fields
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.sharding import MeshConfig
from qwenvl_jax.text.tokenizer import Tokenizer
from qwenvl_jax.train.best import HELDOUT_LOSS
from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.coordinator import Coordinator
from qwenvl_jax.train.data_shard import Data
from qwenvl_jax.train.guard import Guard
from qwenvl_jax.train.heldout import HeldOut
from qwenvl_jax.train.init import InitFrom
from qwenvl_jax.train.objective import NextToken, Objective
from qwenvl_jax.train.optimizer import OptimizerConfig
from qwenvl_jax.train.profile import check_steps
from qwenvl_jax.train.step import check_batch

# The measure of `TrainConfig.best` that follows from the rest.
AUTO = 'auto'

# Before the names of scores in the records of a run.
PREFIX = 'eval/'


class Evaluation(Protocol):
  """What scores a model (`eval.training.DuringTraining`).

  Attributes:
    every: steps between two evaluations; the run's last step has one, too.
    measure: name of the score that decides, unless `TrainConfig.best` does,
      which state is best; the highest is.
  """

  every: int
  measure: str

  def __call__(
    self, config: QwenVLConfig, params: Any, workdir: Path
  ) -> dict[str, float]:
    """Returns scores by name."""


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
    best: which state is kept in WORKDIR/best beside the newest ones: that with
      the lowest 'heldout_loss', or with the highest score, 'eval/TASK/METRIC'
      as in the log. 'auto' is the evaluation's first score, else, of a run with
      `HeldOut.patience`, the held-out loss; None keeps none.
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
  best: str | None = AUTO
  guard: Guard | None = None
  profile_steps: tuple[int, int] | None = None
  notice: float = 30.0

  def __post_init__(self):
    if self.profile_steps is not None:
      check_steps(self.profile_steps)
    check_fields(self, lambda x: x > 0, 'must be more than 0 seconds', 'notice')
    if not 0 <= self.seed < 2**32:
      raise ConfigError(
        f'TrainConfig.seed={self.seed} is not from 0 to 2**32 - 1: JAX would '
        'use its last 32 bits, those of another seed'
      )
    check_at_least_1(self, 'accumulation', 'log_every', 'max_skipped')
    if self.best not in (None, AUTO, HELDOUT_LOSS) and not (
      self.best.startswith(PREFIX)
    ):
      raise ConfigError(
        f'TrainConfig.best={self.best!r} is neither {HELDOUT_LOSS!r} nor a '
        f"score's name, '{PREFIX}TASK/METRIC'"
      )
    needed = 'heldout' if self.best == HELDOUT_LOSS else 'evaluation'
    if self.best not in (None, AUTO) and getattr(self, needed) is None:
      raise ConfigError(
        f'TrainConfig.best={self.best!r} needs TrainConfig.{needed}, which is '
        'None'
      )
    if self.heldout and self.heldout.patience and self.measure is None:
      raise ConfigError(
        f'HeldOut.patience={self.heldout.patience} counts from the best state, '
        'and TrainConfig.best=None keeps none'
      )

  @property
  def measure(self) -> str | None:
    """Name in the log of what decides which state is best; None for none."""
    if self.best != AUTO:
      return self.best
    if self.evaluation is not None:
      return PREFIX + self.evaluation.measure
    if self.heldout is not None and self.heldout.patience is not None:
      return HELDOUT_LOSS
    return None

  @property
  def measured_every(self) -> int:
    """Steps between two values of `measure`, of a run that has one."""
    by_loss = self.measure == HELDOUT_LOSS
    return (self.heldout if by_loss else self.evaluation).every


def check_run(
  config: TrainConfig, mesh: Mesh, coordinator: Coordinator
) -> None:
  """Finds what cannot work before anything is read or compiled.

  Raises:
    ConfigError: says what does not fit what, and what would.
  """
  if coordinator.count != jax.process_count():
    raise ConfigError(
      f'this is one of {jax.process_count()} processes: join them with '
      '`qwenvl_jax.train.processes.joined` and pass on what it gives'
    )
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
