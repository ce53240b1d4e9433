"""The mesh, and the one table that maps logical axes to mesh axes.

Model code names axes by what they mean ('embed', 'heads'); only this file knows
which mesh axis splits them. One device is the mesh of 1 x 1 x 1 and needs
no special case.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import ConfigError

# 'data' repeats the parameters, 'fsdp' splits them, both split the batch;
# 'tensor' splits each layer's work.
MESH_AXES = ('data', 'fsdp', 'tensor')

BATCH_AXES = ('data', 'fsdp')

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  # Parameters.
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  # The embedding is split along its width: splitting its rows would gather
  # the whole table for every look-up.
  ('vocab_rows', None),
  ('head_dim', None),
  ('layers', None),
  ('norm', None),
  ('patch', None),
  ('queries', None),
  # Activations.
  ('batch', BATCH_AXES),
  ('length', None),
  ('patches', None),
  ('embed_act', None),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; at most one is -1, "all devices that are left"."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def sizes(self, devices: int) -> tuple[int, int, int]:
    """Resolves -1 for a number of devices.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = [self.data, self.fsdp, self.tensor]
    written = ', '.join(
      f'{a}={s}' for a, s in zip(MESH_AXES, sizes, strict=True)
    )
    if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
      raise ConfigError(
        f'MeshConfig({written}): sizes are positive, and at most one is -1'
      )
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
      sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
      divisors = [d for d in range(1, devices + 1) if devices % d == 0]
      raise ConfigError(
        f'MeshConfig({written}) does not fit {devices} device(s): the sizes '
        f'must multiply to {devices}, so each is one of {divisors}'
      )
    return tuple(sizes)


def make_mesh(
  config: MeshConfig = MeshConfig(), devices: Sequence | None = None
) -> Mesh:
  """A mesh over all devices (or those given) with the axes `MESH_AXES`."""
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(
    config.sizes(len(devices)),
    MESH_AXES,
    # The default, Explicit, would ask for a sharding in every einsum.
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
  """Trace and run under this mesh.

  Without `jax.set_mesh` the logical constraints inside the model are dropped
  silently.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def data_shards(mesh: Mesh) -> int:
  """How many ways the batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the leading axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def _mesh_axes(name: str | None, size: int, mesh: Mesh):
  table = dict(RULES)
  if name is None:
    return None
  if name not in table:
    raise KeyError(f'logical axis {name!r} is not in sharding.RULES')
  axes = table[name]
  if axes is None:
    return None
  count = math.prod(
    mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes)
  )
  # A width that does not split evenly (1664 over 256) stays whole.
  return axes if size % count == 0 else None


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
  """Where each parameter lives.

  Args:
    boxed: tree of parameters or `ShapeDtypeStruct`s as a linen `init` returns
      it, leaves in `nn.LogicallyPartitioned`; plain leaves are replicated.
    mesh: see `make_mesh`.

  Returns:
    The unboxed tree with a `NamedSharding` for each leaf.
  """

  def sharding(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return replicated(mesh)
    axes = [
      _mesh_axes(name, size, mesh)
      for name, size in zip(leaf.names, leaf.value.shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree.map(
    sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch as one global array over all processes.

  Args:
    batch: name -> [b,...], the rows of this process.
    mesh: see `make_mesh`.

  Returns:
    name -> [b * processes,...], split along the leading axis.
  """
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
    for name, value in batch.items()
  }
