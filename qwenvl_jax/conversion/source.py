"""Where the values of a conversion come from: one interface, several kinds.

A source gives the box of every parameter of a block. Sources compose: one for
each part of the tree, a cast around another.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore

from qwenvl_jax.conversion import layout, orbax_store
from qwenvl_jax.conversion.blocks import Block
from qwenvl_jax.conversion.families.foreign import of_names
from qwenvl_jax.conversion.reader import Tensor
from qwenvl_jax.conversion.rules import Rule, nbytes
from qwenvl_jax.conversion.transpose import copy_into, row_stride
from qwenvl_jax.conversion.writer import DTYPES, narrow
from qwenvl_jax.errors import CheckpointError

_FLOATS = list(map(np.dtype, DTYPES.values()))
_LONG_ROW = 1024  # Bytes.


class Source:
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
    boxes = [
      np.empty(block.box_shape, self.dtypes[path]) for path in block.paths
    ]
    self.read_into(block, boxes)
    return boxes

  def read_into(self, block: Block, boxes: Sequence[np.ndarray]) -> None:
    """Fills arrays with what `read` gives. A source has one of both itself.

    Args:
      block: which values.
      boxes: [*block.box_shape] for each of `block.paths`, with any strides.
    """
    for box, values in zip(boxes, self.read(block), strict=True):
      copy_into(box, values)

  def position(self, block: Block) -> tuple:
    """Sorts blocks as their values are stored; equal where that is unknown."""
    del block
    return ()


class ReleasedSource(Source):
  """Tensors in a released layout, under any table with the same paths."""

  def __init__(
    self,
    tensors: Mapping[str, Tensor],
    table: list[Rule],
    where: str,
    cast: bool = False,
  ):
    """Checks names, shapes and dtypes.

    Args:
      tensors: all of the checkpoint.
      table: what they must be.
      where: the checkpoint, for messages.
      cast: whether values are cast after reading, so that layers may have
        several dtypes: they come in one that holds all of them.

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
    self._tensors, self._scratch = dict(tensors), _Scratch()
    self._rules = {path: rule for rule in table for path in rule.paths}
    self.dtypes = {
      path: self._dtype(rule, cast) for path, rule in self._rules.items()
    }

  def _dtype(self, rule: Rule, cast: bool) -> np.dtype:
    names = rule.released_names()
    first = self._tensors[names[0]].dtype
    known = _FLOATS
    if cast:
      first, known = self._widen(names), [*known, np.dtype(np.float64)]
    for name in names:
      tensor = self._tensors[name]
      if tensor.dtype not in known and not layout.is_packed(name):
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

  def _widen(self, names: Sequence[str]) -> np.dtype:
    """Gives floats of several dtypes one that holds all of their values."""
    dtypes = {self._tensors[name].dtype for name in names}
    if len(dtypes) == 1 or any(dtype.kind not in 'fV' for dtype in dtypes):
      return self._tensors[names[0]].dtype
    wide = np.dtype(f'f{max(4, *(dtype.itemsize for dtype in dtypes))}')
    for name in names:
      self._tensors[name] = _as_dtype(self._tensors[name], wide)
    return wide

  def read_into(self, block: Block, boxes: Sequence[np.ndarray]) -> None:
    tensor, rule = self._tensor(block), self._rules[block.paths[0]]
    if block.name not in rule.released_names():
      # Under this table, its rows lie elsewhere.
      arrays = dict(zip(rule.paths, rule.to_ours(tensor.load()), strict=True))
      for path, box in zip(block.paths, boxes, strict=True):
        box[...] = arrays[path][block.box[-arrays[path].ndim :]]
      return
    rows = block.released_view(boxes[0])
    if rows is not None:
      tensor.read_into(block.start, rows)
      return
    rows = self._scratch.rows(
      block.stop - block.start, block.row_shape, tensor.dtype
    )
    tensor.read_into(block.start, rows)
    block.to_ours(rows, boxes)

  def position(self, block: Block) -> tuple:
    tensor = self._tensor(block)
    offset = tensor.stored.offset if tensor.stored else 0
    return str(tensor.file), offset, block.start

  def _tensor(self, block: Block) -> Tensor:
    """The tensor of a block, whatever it is called here."""
    names = self._rules[block.paths[0]].released_names()
    return self._tensors[names[block.layer or 0]]


def _as_dtype(tensor: Tensor, dtype: np.dtype) -> Tensor:
  def read(start, stop):
    return tensor.read(start, stop).astype(dtype)

  return Tensor(tensor.shape, dtype, tensor.file, read)


class _Scratch(threading.local):
  """Memory that a thread uses again and again: new memory costs a pass."""

  def __init__(self):
    self._buffer = np.empty(0, np.uint8)

  def rows(self, count: int, shape: tuple[int, ...], dtype) -> np.ndarray:
    """[count,*shape] with undefined values, its rows as far as is good."""
    size = nbytes(shape, dtype)
    # Short rows are better read at once than transposed fast.
    stride = row_stride(size) if size >= _LONG_ROW else size
    if count * stride > self._buffer.size:
      self._buffer = np.empty(count * stride, np.uint8)
    rows = self._buffer[: count * stride].reshape(count, stride)[:, :size]
    return rows.view(dtype).reshape(count, *shape)


class OrbaxSource(Source):
  """The arrays of an Orbax checkpoint."""

  def __init__(self, path: Path):
    """Opens the arrays.

    Raises:
      CheckpointError: the checkpoint is incomplete or damaged.
    """
    self._path, self._scratch = path, _Scratch()
    self._stores = orbax_store.open_stores(path)
    self.dtypes = {
      name: np.dtype(store.dtype.numpy_dtype)
      for name, store in self._stores.items()
    }
    self.shapes = {name: store.shape for name, store in self._stores.items()}

  def read_into(self, block: Block, boxes: Sequence[np.ndarray]) -> None:
    with self._told(block.paths):
      for path, box in zip(block.paths, boxes, strict=True):
        self._read_box(path, block, box)

  def check_dtypes(self) -> None:
    """Raises CheckpointError if parameters are no floats."""
    for path, dtype in self.dtypes.items():
      floats = dtype in _FLOATS or dtype == np.float64
      if not floats and not layout.is_packed(path):
        raise CheckpointError(
          f'{self._path}: {path} has dtype {dtype}, which is not supported for '
          f'parameters ({", ".join(DTYPES)})'
        )

  @contextlib.contextmanager
  def _told(self, paths: Sequence[str]):
    try:
      yield
    except ValueError as error:
      reason = str(error).split('[')[0].strip()
      raise CheckpointError(
        f'{self._path}: {" or ".join(paths)} cannot be read ({reason}); '
        'a file of it is missing or damaged'
      ) from error

  def released(self, table: list[Rule]) -> dict[str, Tensor]:
    """Gives released tensors, of which each is read as a whole."""

    def tensor(rule: Rule, layer: int) -> Tensor:
      def read(start, stop):
        with self._told(rule.paths):
          stores = [self._stores[path] for path in rule.paths]
          stores = stores if rule.layers is None else [x[layer] for x in stores]
          arrays = [store.read().result() for store in stores]
        return np.ascontiguousarray(rule.to_released(*arrays)[start:stop])

      return Tensor(rule.shape, self.dtypes[rule.paths[0]], self._path, read)

    return {
      name: tensor(rule, layer)
      for rule in table
      for layer, name in enumerate(rule.released_names())
    }

  def _read_box(self, path: str, block: Block, box: np.ndarray) -> None:
    stored = self._stores[path][block.box]
    values = box
    if not box.flags.c_contiguous:  # TensorStore transposes slowly.
      rows, *shape = block.box_shape
      values = self._scratch.rows(rows, tuple(shape), box.dtype)
    # TensorStore's own `read` into new memory takes three times as long.
    tensorstore.array(values, copy=False, write=True).write(stored).result()
    if values is not box:
      copy_into(box, values)


class ArraySource(Source):
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
class JoinedSource(Source):
  """Several sources as one: each parameter comes from the first that has it."""

  sources: Sequence[Source]

  @functools.cached_property
  def dtypes(self) -> dict[str, np.dtype]:
    return {
      path: dtype
      for source in reversed(self.sources)
      for path, dtype in source.dtypes.items()
    }

  def read_into(self, block: Block, boxes: Sequence[np.ndarray]) -> None:
    (path, *_) = block.paths
    source = next(x for x in self.sources if path in x.dtypes)
    source.read_into(block, boxes)


@dataclasses.dataclass(frozen=True)
class CastSource(Source):
  """Another source in one dtype, but for packed kernels.

  Attributes:
    source: the other.
    dtype: to cast to.
    where: the checkpoint, for messages.
  """

  source: Source
  dtype: np.dtype
  where: str

  @classmethod
  def of(cls, source: Source, dtype: np.dtype, where: str) -> Source:
    """Wraps a source, unless it is of this dtype already."""
    cast = cls(source, dtype, where)
    return source if cast.dtypes == source.dtypes else cast

  def position(self, block: Block) -> tuple:
    return self.source.position(block)

  @functools.cached_property
  def dtypes(self) -> dict[str, np.dtype]:
    return {
      path: stored if layout.is_packed(path) else np.dtype(self.dtype)
      for path, stored in self.source.dtypes.items()
    }

  def read(self, block: Block) -> list[np.ndarray]:
    if layout.is_packed(block.paths[0]):
      return self.source.read(block)
    try:
      return [
        narrow(block.name, x, self.dtype) for x in self.source.read(block)
      ]
    except OverflowError as error:
      raise CheckpointError(f'{self.where}: {error}') from error


@dataclasses.dataclass(frozen=True)
class GrownSource(Source):
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

  @functools.cached_property
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
