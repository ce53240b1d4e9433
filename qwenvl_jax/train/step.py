"""One compiled training step: accumulate, clip, update or skip."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.fsdp import whole_vectors
from qwenvl_jax.model.lora import FACTORS
from qwenvl_jax.sharding import (
  BATCH_AXES,
  batch_sharding,
  data_shards,
  replicated,
  use_mesh,
)
from qwenvl_jax.train.compiler import compiler_options
from qwenvl_jax.train.objective import Objective
from qwenvl_jax.train.optimizer import (
  OptimizerConfig,
  make_optimizer,
  merge,
)
from qwenvl_jax.train.state import TrainState

# Sums over a batch that are reported as they are, not divided by the weight.
COUNTS = ('tokens', 'images')

# Names of the parameters that are multiplied by.
_MATRICES = ('kernel', *FACTORS)


def check_batch(rows: int, accumulation: int, mesh: Mesh) -> None:
  """Raises ConfigError if rows do not split evenly into microbatches."""
  shards = data_shards(mesh)
  if accumulation < 1:
    raise ConfigError(f'accumulation={accumulation} must be at least 1')
  if rows % (accumulation * shards) == 0:
    return
  possible = [a for a in range(1, rows + 1) if rows % (a * shards) == 0]
  unit = accumulation * shards
  raise ConfigError(
    f'a global batch of {rows} rows does not split into accumulation='
    f'{accumulation} microbatches over {shards} data shard(s) (mesh '
    f'{dict(mesh.shape)}): '
    + (
      f'accumulation may be one of {possible}'
      if possible
      else f'the batch must be a multiple of {shards}'
    )
    + f', or the batch {max(rows // unit, 1) * unit} or '
    f'{(rows // unit + 1) * unit}'
  )


def _microbatches(batch: Any, count: int, mesh: Mesh) -> Any:
  """[B,...] to [count, B/count,...], without moving rows between devices.

  Each device's rows are dealt to the microbatches in turn: slicing the global
  batch instead would put a microbatch on a part of the devices.
  """
  sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

  def deal(x):
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, sharding)

  return jax.tree.map(deal, batch)


def _working_copy(trained: Any, dtype: Any) -> Any:
  """The matrices in the dtype that they are multiplied in.

  Once a step rather than once a use, and before they are gathered: without the
  barrier the compiler may gather float32 and convert what it got.
  """

  def cast(path, x):
    return x.astype(dtype) if path[-1].key in _MATRICES else x

  if all(x.dtype == dtype for x in jax.tree.leaves(trained)):
    return trained
  return jax.lax.optimization_barrier(
    jax.tree_util.tree_map_with_path(cast, trained)
  )


def accumulate(
  objective: Objective,
  trained: Any,
  frozen: Any,
  batch: dict[str, jax.Array],
  accumulation: int,
  mesh: Mesh,
  key: jax.Array | None = None,
) -> tuple[Any, jax.Array, jax.Array, dict[str, jax.Array]]:
  """Sums loss, gradient and counts over the microbatches of a batch.

  The gradient of a microbatch has the dtype of the computation, the sum that of
  the parameters.

  Args:
    objective: what the loss is.
    trained: parameters to differentiate by; others are in `frozen`.
    frozen: of the same tree.
    batch: arrays [B, ...] of `Batch`, by name.
    accumulation: microbatches; divides the rows of a data shard.
    mesh: that the rows are split over.
    key: what is drawn at random follows from it; None for nothing.

  Returns:
    (gradient of the summed loss, summed loss, summed weight, other sums).
  """

  def loss(trained, rows, key):
    random = {} if key is None else {'key': key}
    total, weight, sums = objective.loss(merge(trained, frozen), rows, **random)
    return total, (weight, sums)

  working = _working_copy(trained, objective.config.dtype)
  working, frozen = whole_vectors(working), whole_vectors(frozen)

  def one(rows, key):
    (total, (weight, sums)), grads = jax.value_and_grad(loss, has_aux=True)(
      working, rows, key
    )
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, trained)
    return grads, total, weight, sums

  if accumulation == 1:
    return one(batch, key)

  keys = None if key is None else jax.random.split(key, accumulation)
  micro = _microbatches(batch, accumulation, mesh)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(one, *jax.tree.map(lambda x: x[0], (micro, keys))),
  )
  sums, _ = jax.lax.scan(
    lambda carry, rows: (jax.tree.map(jnp.add, carry, one(*rows)), None),
    zeros,
    (micro, keys),
  )
  return sums


def train_step(
  state: TrainState,
  batch: dict[str, jax.Array],
  *,
  objective: Objective,
  config: OptimizerConfig,
  accumulation: int,
  mesh: Mesh,
  seed: int = 0,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step, a pure function.

  Loss and gradient are means over the summed weight of the whole batch, so
  accumulation does not change them. Where either is not finite (a batch without
  any loss weight included), parameters, moments and schedule stay as they were.

  Args:
    state: see `TrainState`.
    batch: as the objective takes it, [B,...].
    objective: model and loss.
    config: of the optimizer.
    accumulation: number of microbatches, divides B.
    mesh: see `make_mesh`.
    seed: what is left out at random (dropout) follows from it and the step.

  Returns:
    (new state, metrics): `loss` and `grad_norm` (before the clip) of the
    parameters before the update, `learning_rate`, `weight`, the objective's
    sums, `skipped` and `skipped_in_a_row`.
  """
  key, lora = None, objective.config.lora
  if lora is not None and lora.dropout:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
  grads, total, weight, sums = accumulate(
    objective, state.trained, state.frozen, batch, accumulation, mesh, key
  )
  loss = total / weight
  grads = jax.tree.map(lambda g: g / weight, grads)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)

  updates, opt_state = make_optimizer(config).update(
    grads, state.opt_state, state.trained
  )
  trained = optax.apply_updates(state.trained, updates)

  def keep_if_bad(new, old):
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

  bad = (~finite).astype(jnp.int32)
  new = TrainState(
    step=state.step + 1,
    trained=keep_if_bad(trained, state.trained),
    frozen=state.frozen,
    opt_state=keep_if_bad(opt_state, state.opt_state),
    skipped=state.skipped + bad,
    skipped_in_a_row=(state.skipped_in_a_row + bad) * bad,
  )
  metrics = {
    name: value if name in COUNTS else value / weight
    for name, value in sums.items()
  }
  metrics |= {
    'loss': loss,
    'weight': weight,
    'grad_norm': norm,
    'learning_rate': config.schedule(state.step - state.skipped),
    'skipped': new.skipped,
    'skipped_in_a_row': new.skipped_in_a_row,
  }
  return new, metrics


def compile_step(
  objective: Objective,
  config: OptimizerConfig,
  accumulation: int,
  mesh: Mesh,
  state: TrainState,
  seed: int = 0,
) -> Callable:
  """The jitted step.

  The arguments are those of `train_step`; `state` may be of structs with
  shardings.

  Returns:
    (state, batch) -> (state, metrics). Gives up its state argument (donated).
  """
  shardings = jax.tree.map(lambda x: x.sharding, state)

  step = functools.partial(
    train_step,
    objective=objective,
    config=config,
    accumulation=accumulation,
    mesh=mesh,
    seed=seed,
  )
  compiled = jax.jit(
    step,
    in_shardings=(shardings, batch_sharding(mesh)),
    out_shardings=(shardings, replicated(mesh)),
    donate_argnums=0,
    compiler_options=compiler_options(mesh),
  )

  return _under(mesh, compiled)


def _under(mesh: Mesh, compiled: Callable) -> Callable:
  """A jitted function that is called under a mesh; `jitted` is itself."""

  def run(*arguments):
    with use_mesh(mesh):
      return compiled(*arguments)

  run.jitted = compiled
  return run


def compile_loss(objective: Objective, mesh: Mesh, params: Any) -> Callable:
  """Jitted (params, batch) -> (sum of the loss, sum of the weights)."""
  shardings = jax.tree.map(lambda x: x.sharding, params)
  compiled = jax.jit(
    lambda params, batch: objective.loss(params, batch)[:2],
    in_shardings=(shardings, batch_sharding(mesh)),
    out_shardings=replicated(mesh),
  )
  return _under(mesh, compiled)
