"""What can be compiled for a pod: the programs of training and of inference.

The functions are those that run, on arguments without values: no data set and
no checkpoint is opened.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qwenvl_jax.batch import Batch
from qwenvl_jax.data.pipeline import Pipeline
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer.programs import Functions, decode_options
from qwenvl_jax.infer.sampling import Sampling, Settings
from qwenvl_jax.infer.state import State
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.plan.model_flops import Work, work_of
from qwenvl_jax.sharding import (
  batch_sharding,
  data_shards,
  make_mesh,
  spec,
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
    kept_bytes: of a chip, of what a training step keeps: 'frozen parameters',
      'trained parameters', 'optimizer state'.
    hbm_read_bytes: that each chip has to read from its memory in a step, where
      that is what a step waits for; else None.
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
  kept_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  hbm_read_bytes: float | None = None


def make(
  what: str,
  config: TrainConfig,
  devices: Sequence,
  rows: int | None = None,
  length: int | None = None,
  cache_dtype: str | None = None,
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
    cache_dtype: of the cache in 'decode', see `infer.engine.EngineConfig`.

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
    if value is not None and value < 1:
      raise ConfigError(f'--{name}={value}: must be at least 1')
    if value is not None and what == 'train':
      raise ConfigError(
        f'--{name}={value}: the configuration says that of a training step '
        f'(Pipeline.batch_size={data.batch_size}, '
        f'sequence_length={data.sequence_length})'
      )
  mesh = make_mesh(config.mesh, devices)
  if what == 'train':
    return _train(config, mesh)
  if what == 'eval':
    rows = data.batch_size // config.accumulation if rows is None else rows
    return _eval(config, mesh, rows)
  rows, length = rows or data_shards(mesh), length or data.sequence_length
  if what == 'prefill':
    return _prefill(config, mesh, rows, length)
  return _decode(config, mesh, rows, length, cache_dtype)


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
    kept_bytes={
      'frozen parameters': _shard_bytes(state.frozen),
      'trained parameters': _shard_bytes(state.trained),
      'optimizer state': _shard_bytes(state.opt_state),
    },
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
  """The engine reading prompts at once, with their images."""
  check_batch(rows, 1, mesh)
  data = dataclasses.replace(
    config.data, batch_size=rows, sequence_length=length
  )
  config = _apart(config)
  functions = Functions(config.objective.config, None)
  params = _inference_params(config, mesh)
  batch = abstract_batch(data, mesh)
  images = rows * data.image_slots

  def read(params, pixels, tokens, sources):
    bank = functions.init_bank(images)
    pixels = pixels.reshape(images, *pixels.shape[2:])
    bank = functions.encode(params, bank, pixels, jnp.arange(images))
    lengths = jnp.full(rows, length, jnp.int32)
    prefix = functions.start(length, lengths)
    return functions.prefill(
      params, prefix, bank, tokens, sources, lengths, None
    )

  tokens = batch['tokens']
  return _job(
    config,
    mesh,
    jax.jit(read),
    (params, batch['pixels'], tokens, tokens),
    what='prefill',
    params=params,
    work=dataclasses.replace(work_of(data), logits=1),
  )


def _decode(
  config: TrainConfig,
  mesh: Mesh,
  rows: int,
  length: int,
  cache_dtype: str | None,
) -> Job:
  """One step of the engine: the most likely next token of every slot."""
  check_batch(rows, 1, mesh)
  config = _apart(config)
  functions = Functions(config.objective.config, cache_dtype)
  params = _inference_params(config, mesh)
  state = _abstract_slots(functions, config, rows, length, mesh)
  # A constant, so that what greedy requests do without is not in the program:
  # where it is, the engine passes it by.
  greedy = Settings.create([Sampling()] * rows)

  def step(params, state):
    settings = state.settings
    state = dataclasses.replace(state, settings=greedy)
    state, chosen = functions.choose(state, None, top=0)
    state = dataclasses.replace(state, settings=settings)
    return functions.forward(params, state), chosen

  with use_mesh(mesh):
    options = decode_options()
  return _job(
    config,
    mesh,
    jax.jit(step, donate_argnums=1, compiler_options=options),
    (params, state),
    what='decode',
    params=params,
    work=Work(rows, 1, 0, config.data.image_size, keys=length),
    hbm_read_bytes=_read_bytes(params, state, mesh),
  )


def _job(
  config: TrainConfig, mesh: Mesh, program: Any, arguments: tuple, **about: Any
) -> Job:
  """The job of a jitted program, and other fields of it.

  First of its abstract arguments is what is kept, then what is split as the
  batch is (the engine's state also by 'tensor'); more is too small to count.
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


def _apart(config: TrainConfig) -> TrainConfig:
  """With the decoder's layers apart, as inference has them."""
  model = config.objective.config.replace(scan_layers=False)
  objective = dataclasses.replace(config.objective, config=model)
  return dataclasses.replace(config, objective=objective)


def _abstract_slots(
  functions: Functions,
  config: TrainConfig,
  rows: int,
  length: int,
  mesh: Mesh,
) -> State:
  """The engine's state, placed as `infer.state.place` does."""
  vocabulary = config.objective.config.decoder.vocab_size

  def placed(x):
    names = ('batch', *(None,) * (x.ndim - 1))
    if x.ndim > 2:
      names = ('batch', 'heads_act', None, None)[: x.ndim]
    elif x.shape[1:] == (vocabulary,):
      names = ('batch', 'vocab_act')
    sharding = NamedSharding(mesh, spec(names, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  state = jax.eval_shape(lambda: functions.init_state(rows, length))
  return jax.tree.map(placed, state)


def _read_bytes(params: Any, state: State, mesh: Mesh) -> float:
  """Bytes a chip that a step of decoding has to read from memory.

  The decoder's parameters but for the embedding, of which it takes a row for
  each token, and the whole cache.
  """
  decoder = {k: x for k, x in params['decoder'].items() if k != 'embed'}

  def read(x):
    # What 'fsdp' splits is gathered: every chip reads all that others hold.
    split = 'tensor' in jax.tree.leaves(tuple(x.sharding.spec))
    return _bytes(x) / (mesh.shape['tensor'] if split else 1)

  held = _shard_bytes(state.cache.layers)
  return sum(map(read, jax.tree.leaves(decoder))) + held


def _ideal_bytes(kept: Any, batch: Any, mesh: Mesh) -> float:
  """Bytes a chip of arguments that are split as far as the mesh goes.

  'data' repeats what is kept; the engine's state is split over all axes.
  """
  copies = mesh.shape['data']
  ways = mesh.size if isinstance(batch, State) else data_shards(mesh)
  return _bytes(kept) * copies / mesh.size + _bytes(batch) / ways


def _shard_bytes(tree: Any) -> int:
  """Bytes a chip."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _bytes(tree: Any) -> float:
  return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))
