"""Where the values of a conversion come from: one interface, several kinds.

A source gives the box of every parameter of a block. Sources compose: one for
each part of the tree, a cast around another.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import tensorstore

from qwenvl_jax.conversion import layout, orbax_store
from qwenvl_jax.conversion.blocks import Block
from qwenvl_jax.conversion.family import of_names
from qwenvl_jax.conversion.reader import Tensor
from qwenvl_jax.conversion.writer import DTYPES, narrow
from qwenvl_jax.errors import CheckpointError


class Source(Protocol):
  """Values of parameters.

  Attributes:
    dtypes: of every parameter, by path.
  """

  dtypes: dict[str, np.dtype]

  def read(self, block: Block) -> list[np.ndarray]:
    """The values [*block.box_shape] of each of `block.paths`.

    Raises:
      CheckpointError: a file is damaged, or a value does not fit its dtype.
    """


class ReleasedSource:
  """Tensors in a released layout, under any table with the same paths."""

  def __init__(
    self,
    tensors: Mapping[str, Tensor],
    table: list[layout.Rule],
    where: str,
  ):
    """Checks names, shapes and dtypes.

    Args:
      tensors: all of the checkpoint.
      table: what they must be.
      where: the checkpoint, for messages.

    Raises:
      CheckpointError: tensors are missing, unknown, misshapen or no floats
        (but for packed ones).
    """
    expected = layout.released_shapes(table)
    family = of_names(tensors.keys() - expected.keys())
    if family is not None and not expected.keys() <= tensors.keys():
      where += f' looks like {family} by its tensors'
    layout.check_shapes(
      expected, {name: x.shape for name, x in tensors.items()}, where
    )
    self._tensors = tensors
    self._rules = {path: rule for rule in table for path in rule.paths}
    self.dtypes = {
      path: self._dtype(rule) for path, rule in self._rules.items()
    }

  def _dtype(self, rule: layout.Rule) -> np.dtype:
    names = rule.released_names()
    first = self._tensors[names[0]].dtype
    for name in names:
      tensor = self._tensors[name]
      floats = tensor.dtype in map(np.dtype, DTYPES.values())
      if not floats and not layout.is_packed(name):
        raise CheckpointError(
          f'{tensor.file}: tensor {name} has dtype {tensor.dtype}, which is '
          'not supported for parameters '
          f'({", ".join(DTYPES)})'
        )
      if tensor.dtype != first:
        raise CheckpointError(
          f'{tensor.file}: tensor {name} is {tensor.dtype}, but {names[0]} is '
          f'{first}: layers are stacked and need one dtype. Choose one for all '
          'with --dtype'
        )
    return first

  def read(self, block: Block) -> list[np.ndarray]:
    rules = [self._rules[path] for path in block.paths]
    if set(block.names) <= set(rules[0].released_names()):
      return block.to_ours(
        self._tensors[name].read(block.start, block.stop)
        for name in block.names
      )
    return [self._box(path, block) for path in block.paths]

  def _box(self, path: str, block: Block) -> np.ndarray:
    """A box whose rows lie elsewhere under this table."""
    rule = self._rules[path]
    names, inner = rule.released_names(), block.box
    if block.stacked:
      names, inner = names[block.box[0]], block.box[1:]
    layers = [
      rule.to_ours(self._tensors[name].load())[rule.paths.index(path)][inner]
      for name in names
    ]
    return np.stack(layers) if block.stacked else np.array(layers[0])


class OrbaxSource:
  """The arrays of an Orbax checkpoint."""

  def __init__(self, path: Path):
    """Opens the arrays.

    Raises:
      CheckpointError: the checkpoint is incomplete or damaged.
    """
    self._path = path
    self._stores = orbax_store.open_stores(path)
    self.dtypes = {
      name: np.dtype(store.dtype.numpy_dtype)
      for name, store in self._stores.items()
    }
    self.shapes = {name: store.shape for name, store in self._stores.items()}

  def read(self, block: Block) -> list[np.ndarray]:
    pending = [self._read(path, block.box) for path in block.paths]
    try:
      return [future.result() for future in pending]
    except ValueError as error:
      reason = str(error).split('[')[0].strip()
      raise CheckpointError(
        f'{self._path}: {" or ".join(block.paths)} cannot be read ({reason}); '
        'a file of it is missing or damaged'
      ) from error

  def _read(self, path, box) -> tensorstore.Future:
    return self._stores[path][box].read(order='C')


class ArraySource:
  """A tree of arrays in memory."""

  def __init__(self, params: dict):
    self._arrays = {path: np.asarray(x) for path, x in layout.flatten(params)}
    self.dtypes = {path: x.dtype for path, x in self._arrays.items()}

  def read(self, block: Block) -> list[np.ndarray]:
    return [
      np.ascontiguousarray(self._arrays[path][block.box])
      for path in block.paths
    ]


@dataclasses.dataclass(frozen=True)
class PartsSource:
  """Each part of the tree ('vision', ...) from a source of its own."""

  parts: Mapping[str, Source]

  @property
  def dtypes(self) -> dict[str, np.dtype]:
    return {
      path: dtype
      for part, source in self.parts.items()
      for path, dtype in source.dtypes.items()
      if layout.part_of(path) == part
    }

  def read(self, block: Block) -> list[np.ndarray]:
    return self.parts[layout.part_of(block.paths[0])].read(block)


@dataclasses.dataclass(frozen=True)
class CastSource:
  """Another source in one dtype, but for packed kernels.

  Attributes:
    source: the other.
    dtype: to cast to.
    where: the checkpoint, for messages.
  """

  source: Source
  dtype: np.dtype
  where: str

  @property
  def dtypes(self) -> dict[str, np.dtype]:
    return {
      path: stored if layout.is_packed(path) else np.dtype(self.dtype)
      for path, stored in self.source.dtypes.items()
    }

  def read(self, block: Block) -> list[np.ndarray]:
    if layout.is_packed(block.paths[0]):
      return self.source.read(block)
    names = block.names[0]
    if len(block.names) > 1:
      names += f' to {block.names[-1]}'
    try:
      return [narrow(names, x, self.dtype) for x in self.source.read(block)]
    except OverflowError as error:
      raise CheckpointError(f'{self.where}: {error}') from error


@dataclasses.dataclass(frozen=True)
class GrownSource:
  """A decoder with more rows in its vocabulary than are stored.

  Attributes:
    source: of the stored rows.
    rows: how many those are.
    seed: of the new ones, drawn from a normal distribution with the release's
      deviation of 0.02.
  """

  source: Source
  rows: int
  seed: int

  @property
  def dtypes(self) -> dict[str, np.dtype]:
    return self.source.dtypes

  def read(self, block: Block) -> list[np.ndarray]:
    (path, *_) = block.paths
    if path not in _VOCABULARY or block.stop <= self.rows:
      return self.source.read(block)
    values = np.empty(block.box_shape, self.dtypes[path])
    rows = np.moveaxis(values, block.outer_axis, 0)
    stored = max(self.rows - block.start, 0)
    if stored:
      (old,) = self.source.read(block.until(self.rows))
      rows[:stored] = np.moveaxis(old, block.outer_axis, 0)
    key = (self.seed, _VOCABULARY.index(path), block.start)
    new = np.random.default_rng(key).normal(0, 0.02, rows[stored:].shape)
    rows[stored:] = new.astype(values.dtype)
    return [values]


# One row a token.
_VOCABULARY = ('decoder/embed', 'decoder/lm_head/kernel')


def to_devices(
  source: Source,
  blocks: list[Block],
  shapes: Mapping[str, tuple[int, ...]],
  shardings: Mapping[str, jax.sharding.Sharding],
  cast: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> dict[str, jax.Array]:
  """Reads parameters onto devices, each process its own shards only.

  Host memory holds the shards of one rule's parameters and a block.

  Args:
    source: of the values.
    blocks: all blocks of these parameters.
    shapes: path to the shape of the whole array.
    shardings: path to where it goes.
    cast: applied to every block.

  Returns:
    Path to array.
  """
  arrays, shards = {}, {}
  missing = {}
  for block in blocks:
    for path in block.paths:
      missing[path] = missing.get(path, 0) + 1
  for block in blocks:
    if block.paths[0] not in shards:
      for path in block.paths:
        shards[path] = _Shards(shapes[path], shardings[path])
    if any(shards[path].touches(block.box) for path in block.paths):
      for path, values in zip(block.paths, source.read(block), strict=True):
        shards[path].fill(block.box, cast(values))
    for path in block.paths:
      missing[path] -= 1
      if not missing[path]:
        arrays[path] = shards.pop(path).array()
  return arrays


class _Shards:
  """Host copies of the shards of one array that this process holds."""

  def __init__(self, shape, sharding):
    self._shape, self._sharding = shape, sharding
    indices = sharding.addressable_devices_indices_map(shape).values()
    boxes = {self._key(index) for index in indices}
    self._buffers = dict.fromkeys(boxes)

  def _key(self, index):
    spans = zip(index, self._shape, strict=True)
    return tuple(s.indices(size)[:2] for s, size in spans)

  def touches(self, box) -> bool:
    return any(_overlap(box, key) for key in self._buffers)

  def fill(self, box, values: np.ndarray) -> None:
    for key, buffer in self._buffers.items():
      overlap = _overlap(box, key)
      if overlap is None:
        continue
      if buffer is None:
        buffer = np.empty([b - a for a, b in key], values.dtype)
        self._buffers[key] = buffer
      target = tuple(
        slice(a - k, b - k) for (a, b), (k, _) in zip(overlap, key, strict=True)
      )
      origin = tuple(
        slice(a - s.start, b - s.start)
        for (a, b), s in zip(overlap, box, strict=True)
      )
      buffer[target] = values[origin]

  def array(self) -> jax.Array:
    return jax.make_array_from_callback(
      self._shape,
      self._sharding,
      lambda index: self._buffers[self._key(index)],
    )


def _overlap(box, key):
  """The (start, stop) that both share along each axis, None if nothing."""
  spans = [
    (max(s.start, a), min(s.stop, b))
    for s, (a, b) in zip(box, key, strict=True)
  ]
  return None if any(a >= b for a, b in spans) else spans
