"""The mesh, and the one table that maps logical axes to mesh axes.

Model code names axes by what they mean ('embed', 'heads'); only this file knows
which mesh axis splits them. One device is the mesh of ones and needs no special
case. How layers use parameters that the mesh splits is told in `fsdp.py`.
"""

import contextlib
import contextvars
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.errors import ConfigError

# 'data' repeats the parameters, 'fsdp' and 'inner' split them, all three split
# the batch; 'tensor' splits each layer's work. There are two axes to split
# parameters by, so that a width that does not divide by both together (1664 by
# 256) may be split along two of its kernel's axes (by 16 and by 16).
MESH_AXES = ('data', 'fsdp', 'inner', 'tensor')

BATCH_AXES = ('data', 'fsdp', 'inner')
FSDP_AXES = ('fsdp', 'inner')

# Logical axis -> what splits it. Of a kernel's axes with FSDP_AXES, those are
# split that waste the least memory (`param_spec`).
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
  # Parameters.
  ('embed', FSDP_AXES),
  ('heads', ('tensor', *FSDP_AXES)),
  ('mlp', ('tensor', *FSDP_AXES)),
  ('vocab', ('tensor', *FSDP_AXES)),
  ('head_dim', FSDP_AXES),
  ('vocab_rows', FSDP_AXES),
  ('positions', FSDP_AXES),
  ('queries', FSDP_AXES),
  ('layers', ()),
  ('rank', ()),
  ('norm', ()),
  ('patch_rows', ()),
  ('patch_columns', ()),
  ('colours', ()),
  # Activations.
  ('batch', BATCH_AXES),
  ('length', ()),
  ('patches', ()),
  ('heads_act', ('tensor',)),
  ('vocab_act', ('tensor',)),
  ('embed_act', ()),
  ('cache_rows', BATCH_AXES),
  ('cache_heads', ('tensor',)),
)

# What `rows_over_tensor` has instead.
_ROW_RULES = {
  'batch': (*BATCH_AXES, 'tensor'),
  'heads_act': (),
  'vocab_act': (),
}
_over_tensor = contextvars.ContextVar('rows_over_tensor', default=False)

# What only matrices have, of a parameter's axes.
_MATRICES = frozenset(('embed', 'rank'))

# A TPU keeps arrays in tiles of 8 rows of 128 lanes.
_TILE = (8, 128)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the devices are used; at most one size is -1, "all that are left".

  Attributes:
    data: copies of the parameters. With several slices (groups of chips with a
      slow network between them), a multiple of their number.
    fsdp: how many ways parameters and optimizer state are split.
    tensor: how many ways each layer's work is split.
    inner: the part of `fsdp` that may split another axis of a kernel. On a
      torus, the size of one of its sides.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  inner: int = 1

  def sizes(self, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) for a number of devices, with -1 resolved.

    Raises:
      ConfigError: the axes do not multiply to the number of devices; lists
        meshes that do.
    """
    sizes = [self.data, self.fsdp, self.tensor]
    names = ('data', 'fsdp', 'tensor')
    written = ', '.join(f'{a}={s}' for a, s in zip(names, sizes, strict=True))
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
        f'must multiply to {devices}, so each is one of {divisors}, such as '
        f'{_possible(self, devices)}'
      )
    if self.inner < 1 or sizes[1] % self.inner:
      divisors = [d for d in range(1, sizes[1] + 1) if sizes[1] % d == 0]
      raise ConfigError(
        f'MeshConfig.inner={self.inner} is the part of fsdp={sizes[1]} that '
        f'may split another axis, so it is one of {divisors}'
      )
    return tuple(sizes)


def _possible(config: MeshConfig, devices: int) -> str:
  """A few meshes for so many devices, those nearest to the one wanted first."""
  wanted = (config.data, config.fsdp, config.tensor)
  divisors = [d for d in range(1, devices + 1) if devices % d == 0]
  meshes = [
    (data, devices // data // tensor, tensor)
    for data, tensor in itertools.product(divisors, divisors)
    if devices % (data * tensor) == 0
  ]

  def distance(mesh):
    return sum(
      abs(math.log(size / w)) for size, w in zip(mesh, wanted) if w > 0
    )

  return ' or '.join(
    '(data={}, fsdp={}, tensor={})'.format(*mesh)
    for mesh in sorted(meshes, key=distance)[:3]
  )


def make_mesh(
  config: MeshConfig = MeshConfig(), devices: Sequence | None = None
) -> Mesh:
  """A mesh over all devices (or those given) with the axes `MESH_AXES`.

  Neighbours on an axis are neighbours on the chips' network, on a ring where an
  axis is made of whole sides of it. Between slices, if there are several, only
  'data' reaches.

  Raises:
    ConfigError: the sizes do not fit the devices; says which do.
  """
  devices = jax.devices() if devices is None else list(devices)
  data, fsdp, tensor = config.sizes(len(devices))
  shape = (data, fsdp // config.inner, config.inner, tensor)
  slices = len({getattr(d, 'slice_index', None) or 0 for d in devices})
  if data % slices:
    raise ConfigError(
      f'MeshConfig.data={data} does not split over {slices} slices: parameters '
      'are gathered within a slice, so data must be a multiple of '
      f'{slices} (and fsdp * tensor divide {len(devices) // slices})'
    )

  def arrange(split: bool) -> np.ndarray:
    if slices > 1:
      return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *shape[1:]),
        (slices, 1, 1, 1),
        devices,
        allow_split_physical_axes=split,
      )
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=split
    )

  try:
    try:
      arranged = arrange(split=False)
    except NotImplementedError:
      # Part of a side of the torus is no ring: slower, but it runs.
      arranged = arrange(split=True)
  except NotImplementedError as error:
    raise ConfigError(
      f'the mesh {dict(zip(MESH_AXES, shape, strict=True))} cannot be laid out '
      'on the network of these chips: choose MeshConfig.inner (or tensor, '
      f'data) as the size of one side of the torus ({error})'
    ) from error
  # The default, Explicit, would ask for a sharding in every einsum.
  return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
  """Trace and run under this mesh: the model's placements refer to it.

  Without it they would do nothing.
  """
  with jax.set_mesh(mesh):
    yield


def use_all_devices() -> contextlib.AbstractContextManager:
  """Splits every layer over the devices of this machine, if it has several.

  Of the thread that enters it.
  """
  devices = jax.local_devices()
  if len(devices) == 1:
    return contextlib.nullcontext()
  return use_mesh(make_mesh(MeshConfig(fsdp=1, tensor=-1), devices))


@contextlib.contextmanager
def rows_over_tensor(rows: int) -> Iterator[None]:
  """Traces layers with rows split over 'tensor' as well.

  Each chip then runs whole layers on its own rows, and kernels that 'tensor'
  splits are gathered for their products (`fsdp.multiply`). For many tokens a
  row that is less to send than sums of activations over 'tensor', and other
  work goes on beside it. Does nothing where the rows do not divide by the
  devices.
  """
  mesh = mesh_in_use()
  split = mesh is not None and mesh.shape['tensor'] > 1
  token = _over_tensor.set(split and rows % mesh.size == 0)
  try:
    yield
  finally:
    _over_tensor.reset(token)


def splits_rows_over_tensor() -> bool:
  """Whether `rows_over_tensor` is in effect."""
  return _over_tensor.get()


def data_shards(mesh: Mesh) -> int:
  """How many ways the batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device has whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Splits the leading axis."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def _rule(name: str | None) -> tuple[str, ...]:
  if name is None:
    return ()
  table = dict(RULES)
  if name not in table:
    raise KeyError(f'logical axis {name!r} is not in sharding.RULES')
  if _over_tensor.get():
    return _ROW_RULES.get(name, table[name])
  return table[name]


def _padded(shape: Sequence[int]) -> int:
  """Values that an array of this shape takes room for."""
  tiled = [
    math.ceil(size / tile) * tile
    for size, tile in zip(shape[-2:], _TILE[-len(shape[-2:]) :])
  ]
  return math.prod([*shape[:-2], *tiled])


def param_spec(
  names: Sequence[str | None], shape: Sequence[int], mesh
) -> PartitionSpec:
  """How one parameter is split.

  'tensor' splits what the table says. 'fsdp' and 'inner' split the axes of a
  matrix that leave the smallest shards, padding to the tiles of a TPU included
  (a width of 4096 split 256 ways as the last axis would be padded 8 times), the
  fewest of them. Where that is undecided the first, but of a table of tokens
  the last: if its rows are split, all gradients go to all chips. No axis is
  split unevenly. Vectors are split by layers, if they are stacked.

  Args:
    names: logical axes.
    shape: sizes of these axes.
    mesh: a mesh or abstract mesh with the axes `MESH_AXES`.

  Raises:
    KeyError: an axis is not in the table.
  """
  rules = [_rule(name) for name in names]
  taken = [() for _ in names]
  left = list(shape)
  for axis, rule in enumerate(rules):
    count = mesh.shape['tensor']
    if 'tensor' in rule and count > 1 and shape[axis] % count == 0:
      taken[axis] = ('tensor',)
      left[axis] //= count
  matrix = sum(name != 'layers' for name in names) > 1
  matrix &= not _MATRICES.isdisjoint(names)
  if matrix:
    _split_least(rules, taken, left, mesh, names[0] == 'vocab_rows')
  elif 'layers' in names:
    axis = list(names).index('layers')
    for candidate in (FSDP_AXES, *((a,) for a in FSDP_AXES)):
      count = math.prod(mesh.shape[a] for a in candidate)
      if count > 1 and shape[axis] % count == 0:
        taken[axis] = candidate
        break
  return PartitionSpec(*(axes or None for axes in taken))


def _split_least(rules, taken, left, mesh, last_first) -> None:
  """Adds to `taken` the axes for FSDP_AXES that leave the smallest shards."""
  axes = [axis for axis in FSDP_AXES if mesh.shape[axis] > 1]
  places = [
    [None, *(i for i, rule in enumerate(rules) if axis in rule)]
    for axis in axes
  ]
  best = None
  for choice in itertools.product(*places):
    sizes, even = list(left), True
    for axis, place in zip(axes, choice):
      if place is not None:
        even &= sizes[place] % mesh.shape[axis] == 0
        sizes[place] //= mesh.shape[axis]
    if not even:
      continue
    split = [place for place in choice if place is not None]
    cost = (
      _padded(sizes),
      len(set(split)),
      (len(rules) - 1 in split) != last_first,
      split,
    )
    if best is None or cost < best[0]:
      best = cost, choice
  for axis, place in zip(axes, best[1]):
    if place is not None:
      taken[place] = (*taken[place], axis)


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
    return NamedSharding(mesh, param_spec(leaf.names, leaf.value.shape, mesh))

  return jax.tree.map(
    sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )


def mesh_in_use() -> jax.sharding.AbstractMesh | None:
  """The mesh of `use_mesh`, None without one or where it is not one of ours."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh if mesh.axis_names == MESH_AXES else None


def platform() -> str:
  """What the program being traced will run on, e.g. 'tpu'.

  Of the mesh in use, which may be of chips that are elsewhere (compilation
  ahead of time).
  """
  mesh = mesh_in_use()
  device = None if mesh is None else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


def spec(
  names: Sequence[str | None], shape: Sequence[int], mesh
) -> PartitionSpec:
  """How an activation is split: by the table, whole where that is uneven."""

  def axes(name, size):
    rule = _rule(name)
    even = size % math.prod(mesh.shape[a] for a in rule) == 0
    return rule if rule and even else None

  return PartitionSpec(*map(axes, names, shape))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """Places an activation by its logical axes, under the mesh in use.

  Args:
    x: an array of any shape and dtype.
    *names: a logical axis, or None, for each of its axes.

  Returns:
    The same values.
  """
  mesh = mesh_in_use()
  if mesh is None or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


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
