"""What can be compiled for a pod: the programs of training and of inference.

The functions are those that run, on arguments without values: no data set and
no checkpoint is opened.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from qwenvl_jax.batch import Batch
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.plan.model_flops import Work
from qwenvl_jax.sharding import (
  batch_sharding,
  data_shards,
  make_mesh,
  use_mesh,
)
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import flatten, split
from qwenvl_jax.train.state import abstract_params, abstract_state
from qwenvl_jax.train.step import check_batch, compile_loss, compile_step

WHATS = ('train', 'eval', 'prefill', 'decode')


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile, and what it is for.

  Attributes:
    what: one of `WHATS`.
    config: of the model.
    lower: makes the `jax.stages.Lowered` program.
    mesh: of the topology's devices.
    params: abstract parameters as the program takes them.
    trained: paths of the trained parameters.
    work: of a step.
    accumulation: microbatches a step.
    steps: of the whole run; None where there is no such thing.
    ideal_argument_bytes: of a chip, if all arguments were split as far as the
      mesh goes and nothing padded.
  """

  what: str
  config: QwenVLConfig
  lower: Callable[[], Any]
  mesh: Mesh
  params: Any
  trained: frozenset[str]
  work: Work
  accumulation: int
  steps: int | None
  ideal_argument_bytes: float


def make(what: str, config: TrainConfig, devices: Sequence) -> Job:
  """The program of a configuration for these devices.

  Args:
    what: one of `WHATS`.
    config: of a training run; its data need not be there.
    devices: from `topology.devices`.

  Raises:
    ConfigError: a mesh or a batch that the devices do not allow, or a
      configuration of something else than Qwen-VL.
  """
  data, objective = config.data, config.objective
  if not (isinstance(data, Pipeline) and isinstance(objective, NextToken)):
    raise ConfigError(
      'only runs of Qwen-VL itself can be planned (objective.NextToken on '
      f'pipeline.Pipeline), not {type(objective).__name__} on '
      f'{type(data).__name__}'
    )
  mesh = make_mesh(config.mesh, devices)
  if what == 'train':
    return _train(config, mesh)
  if what == 'eval':
    return _eval(config, mesh)
  raise ConfigError(f'--what={what}: there is {", ".join(WHATS)}')


def abstract_batch(data: Pipeline, mesh: Mesh) -> dict[str, Any]:
  """The batches of a pipeline without their values.

  Returns:
    Field of `Batch` -> `ShapeDtypeStruct` with sharding.
  """
  rows, length = data.batch_size, data.sequence_length
  slots, side = data.image_slots, data.image_size
  shapes = {
    field.name: ((rows, length), np.int32)
    for field in dataclasses.fields(Batch)
  }
  shapes['loss_weights'] = (rows, length), np.float32
  shapes['pixels'] = (rows, slots, side, side, 3), np.uint8
  shapes['image_starts'] = (rows, slots), np.int32
  sharding = batch_sharding(mesh)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for name, (shape, dtype) in shapes.items()
  }


def _train(config: TrainConfig, mesh: Mesh) -> Job:
  check_batch(config.data.batch_size, config.accumulation, mesh)
  params = abstract_params(config.objective, config.optimizer, mesh)
  state = abstract_state(params, config.optimizer, mesh)
  batch = abstract_batch(config.data, mesh)
  step = compile_step(
    config.objective, config.optimizer, config.accumulation, mesh, state
  )

  def lower():
    with use_mesh(mesh):
      return step.jitted.lower(state, batch)

  return Job(
    'train',
    config.objective.config,
    lower,
    mesh,
    params,
    frozenset(flatten(split(params, config.optimizer)[0])),
    _work(config.data),
    config.accumulation,
    config.optimizer.steps,
    _ideal_bytes(state, batch, mesh),
  )


def _eval(config: TrainConfig, mesh: Mesh) -> Job:
  """The loss on held-out data, a whole batch at a time."""
  check_batch(config.data.batch_size, 1, mesh)
  params = abstract_params(config.objective, config.optimizer, mesh)
  batch = abstract_batch(config.data, mesh)
  loss = compile_loss(config.objective, mesh, params)

  def lower():
    with use_mesh(mesh):
      return loss.jitted.lower(params, batch)

  return Job(
    'eval',
    config.objective.config,
    lower,
    mesh,
    params,
    frozenset(),
    _work(config.data),
    1,
    None,
    _ideal_bytes(params, batch, mesh),
  )


def _work(data: Pipeline) -> Work:
  return Work(
    data.batch_size, data.sequence_length, data.image_slots, data.image_size
  )


def _ideal_bytes(kept: Any, batch: Any, mesh: Mesh) -> float:
  """Bytes a chip of arguments that are split as far as the mesh goes.

  Args:
    kept: parameters, or the whole state; 'data' repeats them.
    batch: split over the axes of the batch.
    mesh: see `make_mesh`.
  """
  copies = mesh.shape['data']
  total = _bytes(kept) * copies / mesh.size
  return total + _bytes(batch) / data_shards(mesh)


def _bytes(tree: Any) -> float:
  return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))
