"""Products and look-ups with parameters that the mesh splits.

Parameters are split over 'fsdp' and 'inner' wherever a step keeps them
(`sharding.param_spec`), and gathered, a layer at a time and in the dtype of the
computation, where a layer uses them; their gradients are scattered back at
once.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from qwenvl_jax.sharding import (
  BATCH_AXES,
  FSDP_AXES,
  constrain,
  mesh_in_use,
  param_spec,
  platform,
  spec,
  splits_rows_over_tensor,
)

# Rows up to which a CPU multiplies with the kernel on the left.
_FEW_ROWS = 256

# The name of gathered kernels among what a layer might keep for its backward
# pass: kept, they would be the whole model on every chip.
GATHERED = 'gathered'


def splits_params() -> bool:
  """Whether the mesh in use splits parameters (without one, nothing does)."""
  mesh = mesh_in_use()
  return mesh is not None and any(mesh.shape[a] > 1 for a in FSDP_AXES)


def gathered(kernel: jax.Array, names: Sequence[str]) -> jax.Array:
  """A kernel as a layer uses it: whole but for 'tensor'.

  For small ones; of matrices that are multiplied by, see `multiply`.

  Args:
    kernel: a parameter, or one layer of it.
    names: its logical axes.
  """
  if splits_rows_over_tensor():
    return _gathered(kernel, tuple(names), ())
  if not splits_params():
    return kernel
  return _gathered(kernel, tuple(names), ('tensor',))


def _names(axes) -> tuple[str, ...]:
  """The mesh axes of one entry of a PartitionSpec."""
  return () if axes is None else (axes,) if isinstance(axes, str) else axes


def _whole(kernel, split, kept=('tensor',)):
  """Gathers along all mesh axes but those kept.

  The last axis first, while there is little of it: what is gathered along the
  first axis lies in memory as it is wanted, anything else is copied there.
  """
  place = jax.lax.with_sharding_constraint
  kernel = place(kernel, split)
  axes = [_names(entry) for entry in split]
  for i in reversed(range(kernel.ndim)):
    if not set(axes[i]) <= set(kept):
      axes[i] = tuple(a for a in axes[i] if a in kept)
      kernel = place(kernel, PartitionSpec(*axes))
  return checkpoint_name(kernel, GATHERED)


def _scattered(partial, split):
  """The inverse of `_whole` for gradients: sums over chips, each gets its part.

  Within `shard_map` over BATCH_AXES, of which 'data' only sums. One axis after
  the other, each along a side of the torus: of both at once, a TPU makes an
  all-reduce.
  """
  for i, entry in enumerate(split):
    for axis in _names(entry):
      if axis in FSDP_AXES:
        partial = jax.lax.psum_scatter(
          partial, axis, scatter_dimension=i, tiled=True
        )
  sizes = mesh_in_use().shape
  used = {a for entry in split for a in _names(entry)}
  rest = tuple(a for a in BATCH_AXES if a not in used and sizes[a] > 1)
  return jax.lax.psum(partial, rest) if rest else partial


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(kernel, names, kept):
  return _whole(kernel, param_spec(names, kernel.shape, mesh_in_use()), kept)


def _gathered_forward(kernel, names, kept):
  return _gathered(kernel, names, kept), None


def _gathered_backward(names, kept, _, gradient):
  del kept
  split = param_spec(names, gradient.shape, mesh_in_use())
  return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def multiply(
  x: jax.Array,
  kernel: jax.Array,
  names: Sequence[str],
  axes: int,
  outputs_first: bool = False,
) -> jax.Array:
  """Trailing axes of x against leading axes of a kernel that may be split.

  As one product of two matrices: on a CPU, XLA computes the gradient of the
  same einsum with the axes apart three times slower.

  Where the mesh splits parameters, the kernel is gathered for the product, and
  again for the gradient of x. The gradient of the kernel is summed and
  scattered in one go: left alone, the compiler may sum the whole kernel on
  every chip, which is twice the traffic, and split that.

  There, gradients are products with the axes apart: of heads that are 104 wide,
  a TPU would make one axis by copying them.

  Args:
    x: [B,...,*K].
    kernel: [*K,...], or [...,*K].
    names: logical axes of the kernel.
    axes: how many axes K has.
    outputs_first: whether K are the kernel's last axes (for inference: there
      is no gradient).

  Returns:
    The axes of x before K, then those of the kernel after K.
  """
  if outputs_first:
    return _contract_last(x, gathered(kernel, names), axes)
  if splits_rows_over_tensor():
    return _contract(x, gathered(kernel, names), axes)
  if not splits_params():
    return _contract(x, kernel, axes)
  if spec(['batch'], x.shape[:1], mesh_in_use())[0] is None:
    return _contract(x, gathered(kernel, names), axes)
  return _multiply(x, kernel, tuple(names), axes)


def _contract(x, kernel, axes):
  inner = math.prod(kernel.shape[:axes])
  y = x.reshape(-1, inner) @ kernel.reshape(inner, -1)
  return y.reshape(*x.shape[: x.ndim - axes], *kernel.shape[axes:])


def _contract_last(x, kernel, axes):
  """As `_contract`, of a kernel whose last axes are contracted."""
  outputs = kernel.shape[: kernel.ndim - axes]
  lead = x.shape[: x.ndim - axes]
  x = x.reshape(math.prod(lead), -1)
  kernel = kernel.reshape(math.prod(outputs), -1)
  contract = (((1,), (1,)), ((), ()))
  if platform() == 'cpu' and len(x) <= _FEW_ROWS:
    # The kernel on the left, or few rows take up to three times as long. XLA
    # would exchange the operands again to save the transposition.
    y = jax.lax.dot_general(kernel, x, contract)
    y = jax.lax.optimization_barrier(y).T
  else:
    y = jax.lax.dot_general(x, kernel, contract)
  return y.reshape(*lead, *outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _multiply(x, kernel, names, axes):
  split = param_spec(names, kernel.shape, mesh_in_use())
  return _contract(x, _whole(kernel, split), axes)


def _multiply_forward(x, kernel, names, axes):
  return _multiply(x, kernel, names, axes), (x, kernel)


def _multiply_backward(names, axes, saved, gradient):
  x, kernel = saved
  split = param_spec(names, kernel.shape, mesh_in_use())
  lead = tuple(range(x.ndim - axes))

  def of_kernel(x, gradient):
    return _scattered(jnp.tensordot(x, gradient, (lead, lead)), split)

  manual = PartitionSpec(
    *(tuple(a for a in _names(e) if a in BATCH_AXES) or None for e in split)
  )
  by_kernel = jax.shard_map(
    of_kernel,
    in_specs=PartitionSpec(BATCH_AXES),
    out_specs=manual,
    axis_names=set(BATCH_AXES),
    check_vma=False,
  )(x, gradient)
  outputs = (
    tuple(range(len(lead), gradient.ndim)),
    tuple(range(axes, kernel.ndim)),
  )
  by_x = jnp.tensordot(gradient, _whole(kernel, split), outputs)
  return by_x, by_kernel


_multiply.defvjp(_multiply_forward, _multiply_backward)


def whole_vectors(params: Any) -> Any:
  """Gathers norms' scales and all biases, which layers use as they are."""
  if not splits_params():
    return params

  def place(path, x):
    if path[-1].key not in ('bias', 'scale'):
      return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())

  return jax.tree_util.tree_map_with_path(place, params)


def take_rows(
  table: jax.Array, names: Sequence[str], rows: jax.Array, dtype: Any
) -> jax.Array:
  """Looks rows up in a table that is split by rows, columns or both.

  Columns stay where they are: the chips that share a batch's rows look up the
  tokens of all of them in their own columns, and exchange columns for batch. A
  whole table on every chip would be the largest gather of the step.

  Args:
    table: [V,D].
    names: its logical axes.
    rows: [B,T] int32.
    dtype: of the result. Gradients of a row add up in float32.

  Returns:
    [B,T,D], placed as activations are.
  """
  if not splits_params():
    return jnp.take(table, rows, axis=0).astype(dtype)
  columns = _names(param_spec(names, table.shape, mesh_in_use())[1])
  groups = tuple(a for a in BATCH_AXES if a not in columns)
  if rows.shape[0] % math.prod(mesh_in_use().shape[a] for a in groups):
    groups = ()  # As `spec` has it for a batch that is split unevenly.
  place = jax.lax.with_sharding_constraint
  table = _gathered(table.astype(dtype), tuple(names), columns)
  rows = place(rows, PartitionSpec(groups, None))
  x = jnp.take(table.astype('float32'), rows, axis=0).astype(dtype)
  x = place(x, PartitionSpec(groups, None, columns))
  return constrain(x, 'batch', 'length', 'embed_act')
