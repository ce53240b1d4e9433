"""What can be compiled for a pod: the programs of training and of inference.

The functions are those that run, on arguments without values: no data set and
no checkpoint is opened.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.batch import Batch
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer import generate
from qwenvl_jax.infer.sampling import Chooser, Sampling
from qwenvl_jax.model.cache import KVCache
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.plan.model_flops import Work, work_of
from qwenvl_jax.sharding import (
  BATCH_AXES,
  batch_sharding,
  data_shards,
  make_mesh,
  replicated,
  use_mesh,
)
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import flatten, split
from qwenvl_jax.train.state import abstract_params, abstract_state
from qwenvl_jax.train.step import check_batch, compile_loss, compile_step

WHATS = ('train', 'eval', 'prefill', 'decode')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A program to compile, and what it is for.

  Attributes:
    what: one of `WHATS`.
    config: of the model.
    lower: makes the `jax.stages.Lowered` program.
    mesh: of the topology's devices.
    params: abstract parameters as the program takes them.
    work: of a step.
    ideal_argument_bytes: of a chip, if all arguments were split as far as the
      mesh goes and nothing padded.
    trained: paths of the trained parameters.
    accumulation: microbatches a step.
    steps: of the whole run; None where there is no such thing.
  """

  what: str
  config: QwenVLConfig
  lower: Callable[[], Any]
  mesh: Mesh
  params: Any
  work: Work
  ideal_argument_bytes: float
  trained: frozenset[str] = frozenset()
  accumulation: int = 1
  steps: int | None = None


def make(
  what: str,
  config: TrainConfig,
  devices: Sequence,
  rows: int | None = None,
  length: int | None = None,
) -> Job:
  """The program of a configuration for these devices.

  Args:
    what: one of `WHATS`.
    config: of a training run; its data need not be there.
    devices: from `topology.devices`.
    rows: of 'eval', 'prefill' and 'decode', all chips together; None for those
      of a microbatch in 'eval', else one for each shard of the batch.
    length: tokens of the prompts in 'prefill', slots of the cache in 'decode';
      None for the length of a training row.

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
  for name, value in (('rows', rows), ('length', length)):
    if value is not None and (what == 'train' or value < 1):
      raise ConfigError(
        f'--{name}={value}: '
        + (
          'must be at least 1'
          if value < 1
          else f'the configuration says that of a training step '
          f'(Pipeline.batch_size={data.batch_size}, '
          f'sequence_length={data.sequence_length})'
        )
      )
  mesh = make_mesh(config.mesh, devices)
  if what == 'train':
    return _train(config, mesh)
  if what == 'eval':
    rows = data.batch_size // config.accumulation if rows is None else rows
    return _eval(config, mesh, rows)
  make_inference = _prefill if what == 'prefill' else _decode
  return make_inference(
    config,
    mesh,
    rows or data_shards(mesh),
    length or data.sequence_length,
  )


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
  return _job(
    config,
    mesh,
    step.jitted,
    (state, batch),
    what='train',
    params=params,
    work=work_of(config.data),
    trained=frozenset(flatten(split(params, config.optimizer)[0])),
    accumulation=config.accumulation,
    steps=config.optimizer.steps,
  )


def _eval(config: TrainConfig, mesh: Mesh, rows: int) -> Job:
  """The loss on held-out data."""
  check_batch(rows, 1, mesh)
  data = dataclasses.replace(config.data, batch_size=rows)
  params = abstract_params(config.objective, config.optimizer, mesh)
  batch = abstract_batch(data, mesh)
  loss = compile_loss(config.objective, mesh, params)
  return _job(
    config,
    mesh,
    loss.jitted,
    (params, batch),
    what='eval',
    params=params,
    work=work_of(data),
  )


def _prefill(config: TrainConfig, mesh: Mesh, rows: int, length: int) -> Job:
  """Reading prompts, with their images, into a new cache."""
  check_batch(rows, 1, mesh)
  data = dataclasses.replace(
    config.data, batch_size=rows, sequence_length=length
  )
  model = QwenVL(config.objective.config)
  params = _inference_params(config, mesh)
  batch = abstract_batch(data, mesh)

  def read(params, batch):
    batch = Batch(**batch)
    lengths = jnp.sum(batch.segment_ids, axis=1)
    cache = KVCache.create(model.config, rows, length, lengths)
    return model.apply({'params': params}, batch, cache, method='extend')

  cache = _abstract_cache(model.config, rows, length, mesh)
  places = jax.tree.map(lambda x: x.sharding, cache)
  program = jax.jit(read, out_shardings=(batch_sharding(mesh), places))
  return _job(
    config,
    mesh,
    program,
    (params, batch),
    what='prefill',
    params=params,
    work=dataclasses.replace(work_of(data), logits=1),
  )


def _decode(config: TrainConfig, mesh: Mesh, rows: int, length: int) -> Job:
  """One more token in every row; the cache is given up and comes back."""
  check_batch(rows, 1, mesh)
  model = QwenVL(config.objective.config)
  params = _inference_params(config, mesh)
  cache = _abstract_cache(model.config, rows, length, mesh)
  chooser = Chooser.create(Sampling(), stop_ids=())

  def one(params, cache, tokens, numbers, step):
    logits, cache = generate.extend(model, params, cache, tokens, step)
    return chooser.choose(logits, numbers, step), cache

  split = batch_sharding(mesh)
  tokens = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
  places = jax.tree.map(lambda x: x.sharding, cache)
  program = jax.jit(one, donate_argnums=1, out_shardings=(split, places))
  return _job(
    config,
    mesh,
    program,
    (params, cache, tokens, tokens, step),
    what='decode',
    params=params,
    work=Work(rows, 1, 0, config.data.image_size, keys=length),
  )


def _job(
  config: TrainConfig, mesh: Mesh, program: Any, arguments: tuple, **about: Any
) -> Job:
  """The job of a jitted program.

  Args:
    config: of the run.
    mesh: see `make_mesh`.
    program: has `lower`.
    arguments: abstract; first what is kept, then what is split as the batch is,
      then what is too small to count.
    **about: the other fields of `Job`.
  """

  def lower():
    with use_mesh(mesh):
      return program.lower(*arguments)

  kept, batch, *_ = arguments
  return Job(
    config=config.objective.config,
    lower=lower,
    mesh=mesh,
    ideal_argument_bytes=_ideal_bytes(kept, batch, mesh),
    **about,
  )


def _inference_params(config: TrainConfig, mesh: Mesh) -> Any:
  """Parameters in the dtype of the computation, as they are loaded to run."""
  params = abstract_params(config.objective, config.optimizer, mesh)
  dtype = config.objective.config.dtype

  def loaded(x):
    packed = jnp.issubdtype(x.dtype, jnp.integer)
    kind = x.dtype if packed else dtype
    return jax.ShapeDtypeStruct(x.shape, kind, sharding=x.sharding)

  return jax.tree.map(loaded, params)


def _abstract_cache(config, rows: int, length: int, mesh: Mesh) -> KVCache:
  """A cache split like the batch, and its heads like those of the layers."""
  shapes = jax.eval_shape(
    lambda lengths: KVCache.create(config, rows, length, lengths),
    jax.ShapeDtypeStruct((rows,), jnp.int32),
  )
  stored = NamedSharding(
    mesh, PartitionSpec(None, BATCH_AXES, None, 'tensor', None)
  )
  split = batch_sharding(mesh)
  places = KVCache(stored, stored, split, replicated(mesh), split)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
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
