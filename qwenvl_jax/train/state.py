"""The state of a run: what a step takes and gives, and where it lives."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qwenvl_jax.conversion.layout import is_packed
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.lora import is_factor
from qwenvl_jax.model.qwen_vl import CONSTANTS
from qwenvl_jax.sharding import param_shardings, replicated
from qwenvl_jax.train.objective import Objective
from qwenvl_jax.train.optimizer import (
  OptimizerConfig,
  flatten,
  make_optimizer,
  merge,
  split,
  unflatten,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that changes, and the frozen parameters.

  Attributes:
    step: int32, batches consumed, skipped ones included. `step - skipped` is
      the number of updates, the k of the schedule.
    trained: nested dict, master copies in the config's `param_dtype`.
    frozen: nested dict, in the dtype of the computation; constants that the
      model computes with in float32 stay float32.
    opt_state: of the trained parameters only.
    skipped: int32, steps without update because loss or gradient was not
      finite.
    skipped_in_a_row: int32, how many of those were the latest steps.
  """

  step: jax.Array
  trained: Any
  frozen: Any
  opt_state: Any
  skipped: jax.Array
  skipped_in_a_row: jax.Array

  @property
  def params(self) -> Any:
    """The whole tree of parameters."""
    return merge(self.trained, self.frozen)


def _stored_dtypes(params: Any, objective: Objective, config: OptimizerConfig):
  """The dtype that each parameter is kept in, by path."""
  trained, frozen = split(params, config)
  compute = objective.config.dtype
  master = objective.config.param_dtype
  dtypes = dict.fromkeys(flatten(trained), master)
  for path in flatten(frozen):
    dtypes[path] = master if path in CONSTANTS else compute
  return dtypes


def abstract_params(
  objective: Objective, config: OptimizerConfig, mesh: Mesh
) -> Any:
  """The parameter tree of a run without its values.

  Returns:
    Nested dict of `ShapeDtypeStruct` with dtype and sharding as a run keeps
    them.
  """
  boxed = jax.eval_shape(objective.init, jax.random.key(0))
  shapes = flatten(nn.meta.unbox(boxed))
  shardings = flatten(param_shardings(boxed, mesh))
  dtypes = _stored_dtypes(nn.meta.unbox(boxed), objective, config)
  for path, leaf in shapes.items():
    if is_packed(path) or jnp.issubdtype(leaf.dtype, jnp.integer):
      dtypes[path] = leaf.dtype
  return unflatten(
    {
      path: jax.ShapeDtypeStruct(
        leaf.shape, dtypes[path], sharding=shardings[path]
      )
      for path, leaf in shapes.items()
    }
  )


def run_once_options() -> dict | None:
  """Compiler options for programs that run once.

  Over many small leaves, optimizing takes a CPU far longer than running.
  """
  if jax.default_backend() != 'cpu':
    return None
  return {'xla_backend_optimization_level': 0}


def random_params(objective: Objective, target: Any, seed: int) -> Any:
  """Initializes parameters in their places.

  Args:
    target: from `abstract_params`, or the part of that tree that is wanted.
    seed: the values depend on it only, not on the mesh.

  Returns:
    Nested dict of arrays.
  """
  wanted = flatten(target)

  def init(key):
    params = flatten(nn.meta.unbox(objective.init(key)))
    return {path: params[path].astype(t.dtype) for path, t in wanted.items()}

  shardings = {path: t.sharding for path, t in wanted.items()}
  compiled = jax.jit(
    init, out_shardings=shardings, compiler_options=run_once_options()
  )
  return unflatten(compiled(jax.random.key(seed)))


def create_state(
  params: Any, config: OptimizerConfig, mesh: Mesh
) -> TrainState:
  """The state before the first step.

  Returns:
    A state of values.
  """
  trained, frozen = split(params, config)
  abstract = abstract_state(params, config, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
  init = jax.jit(make_optimizer(config).init, out_shardings=shardings)

  def zero():
    return jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))

  return TrainState(zero(), trained, frozen, init(trained), zero(), zero())


def abstract_state(
  params: Any, config: OptimizerConfig, mesh: Mesh
) -> TrainState:
  """`create_state` without values: `ShapeDtypeStruct`s with shardings.

  Raises:
    ConfigError: a parameter that is to be trained is no float.
  """

  def struct(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  params = jax.tree.map(lambda x: struct(x, x.sharding), params)
  trained, frozen = split(params, config)
  for path, leaf in flatten(trained).items():
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ConfigError(
        f'{path} is {leaf.dtype}: kernels of 4 bits (DecoderConfig.int4_group) '
        'cannot be trained, only low-rank factors beside them '
        '(finetune/qlora.gin)'
      )
  still = [path for path in flatten(frozen) if is_factor(path)]
  if still:
    raise ConfigError(
      f'OptimizerConfig.trainable={config.trainable} leaves {still[0]} as it '
      "starts: with QwenVLConfig.lora it must match all factors ('.*/lora_.')"
    )
  optimizer = make_optimizer(config)
  everywhere = replicated(mesh)
  # Moments live where their parameters live; counters everywhere.
  opt_state = optax.tree_map_params(
    optimizer,
    lambda x, parameter: struct(x, parameter.sharding),
    jax.eval_shape(optimizer.init, trained),
    trained,
    transform_non_params=lambda x: struct(x, everywhere),
  )
  counter = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  return TrainState(counter, trained, frozen, opt_state, counter, counter)
