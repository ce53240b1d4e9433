"""Reads parameters onto devices, as fast as their files are read.

A few threads read blocks, transpose them and put them to their places in host
arrays; an array goes to its devices when it is full. On a CPU it stays where it
is: JAX takes the memory over if that starts at a cache line.
"""

import collections
from collections.abc import (
  Callable,
  Container,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)
from typing import NamedTuple

import jax
import numpy as np

from qwenvl_jax.conversion.blocks import Block, in_threads
from qwenvl_jax.conversion.rules import nbytes
from qwenvl_jax.conversion.tensors import Tensor
from qwenvl_jax.conversion.transpose import copy_into
from qwenvl_jax.model.stacking import (
  apart_path,
  inputs_of,
  is_plain_kernel,
  is_stacked,
)

# So that one reads while another transposes; a disk wants few.
THREADS = 3
# Of a bucket, whose answers come late but many at a time.
BUCKET_THREADS = 16

# From path and array to what is kept of it, by path.
Finish = Callable[[str, jax.Array], Mapping[str, jax.Array]]

# Where JAX on a CPU takes host memory over rather than copy it.
_ALIGNMENT = 64


def to_devices(
  tensors: Mapping[str, Tensor],
  blocks: Iterable[Block],
  shapes: Mapping[str, tuple[int, ...]],
  shardings: Mapping[str, jax.sharding.Sharding],
  threads: int = THREADS,
  outputs_first: bool = False,
  finish: Finish = lambda path, array: {path: array},
) -> dict[str, jax.Array]:
  """Reads parameters onto devices, each process its own shards only.

  Beside the arrays, host memory holds a few blocks; where the devices have
  memory of their own, only the arrays that are not full yet.

  Args:
    tensors: by their released names.
    blocks: all blocks of these parameters.
    shapes: path to the shape of the whole array. Of the decoder's layers either
      stacked or apart (see `model.stacking`), which decides what is returned.
    shardings: path to where it goes.
    threads: how many blocks are read at a time.
    outputs_first: whether the decoder's plain kernels go to arrays with their
      outputs first (see there); `shapes` has them so.
    finish: applied to each array as soon as it is there.

  Returns:
    Path to array, of those that `finish` gave.

  Raises:
    CheckpointError: a file is damaged, or a value does not fit its dtype.
  """
  wanted = [_Read.of(block, shapes, outputs_first) for block in blocks]
  reads = _stored_order(tensors, [read for read in wanted if read.parts])
  missing = collections.Counter(
    part.path for read in reads for part in read.parts
  )
  shards, arrays = {}, {}

  def placed():
    for read in reads:
      dtype = tensors[read.block.name].dtype
      for part in read.parts:
        if part.path not in shards:
          shards[part.path] = _Shards(
            shapes[part.path], dtype, shardings[part.path]
          )
      yield read, [shards[part.path] for part in read.parts]

  def run(item):
    read, targets = item
    read.run(tensors[read.block.name], targets)
    return read

  for read in in_threads(run, placed(), threads):
    for part in read.parts:
      missing[part.path] -= 1
      if not missing[part.path]:
        array = shards.pop(part.path).array()
        arrays.update(finish(part.path, array))
  return arrays


class _Part(NamedTuple):
  """What of a block goes to one array.

  Attributes:
    path: of the array.
    index: of the block's parameters, which one.
    apart: whether the array is of the block's layer alone.
    inputs: how many axes of the block's values are the last of the array.
    box: where in the array.
  """

  path: str
  index: int
  apart: bool
  inputs: int
  box: tuple[slice, ...]

  def as_array(self, values: np.ndarray) -> np.ndarray:
    """A view of values of the block with axes as the array has them."""
    values, last = values[0] if self.apart else values, range(-self.inputs, 0)
    return np.moveaxis(values, tuple(range(self.inputs)), tuple(last))


class _Read(NamedTuple):
  """A block and where it goes."""

  block: Block
  parts: tuple[_Part, ...]

  @classmethod
  def of(
    cls, block: Block, wanted: Container[str], outputs_first: bool
  ) -> '_Read':
    """The read of those arrays that are wanted, stacked or apart."""
    parts = []
    for index, path in enumerate(block.paths):
      apart = path not in wanted and is_stacked(path)
      path = apart_path(path, block.layer) if apart else path
      if path in wanted:
        moves = outputs_first and is_plain_kernel(path)
        inputs, box = inputs_of(path) if moves else 0, block.box[apart:]
        box = (*box[inputs:], *box[:inputs])
        parts.append(_Part(path, index, apart, inputs, box))
    return cls(block, tuple(parts))

  def run(self, tensor: Tensor, targets: Sequence['_Shards']) -> None:
    """Reads into the shards of each part, without a copy where that can be."""
    block, pairs = self.block, list(zip(self.parts, targets, strict=True))
    if not any(target.touches(part.box) for part, target in pairs):
      return
    rows = np.empty((block.stop - block.start, *tensor.shape[1:]), tensor.dtype)
    values = [part.as_array(block.views(rows)[part.index]) for part, _ in pairs]
    part, target = pairs[0]
    place = target.view(part.box)
    # One array, whose values are where the rows have them.
    direct = len(block.paths) == 1 and values[0].flags.c_contiguous
    if direct and place is not None and place.flags.c_contiguous:
      tensor.read_into(block.start, place.reshape(rows.shape))
      return
    tensor.read_into(block.start, rows)
    for (part, target), value in zip(pairs, values, strict=True):
      target.fill(part.box, value)


def _stored_order(
  tensors: Mapping[str, Tensor], reads: list[_Read]
) -> list[_Read]:
  """Sorts reads as files hold them, those of the same arrays together."""

  def position(read):
    block, tensor = read.block, tensors[read.block.name]
    return str(tensor.file), tensor.offset, block.layer or 0, block.start

  groups = {}
  for read in reads:
    paths = tuple(part.path for part in read.parts)
    groups.setdefault(paths, []).append(read)
  ordered = [sorted(group, key=position) for group in groups.values()]
  ordered.sort(key=lambda group: position(group[0]))
  return [read for group in ordered for read in group]


class _Shards:
  """Host copies of the shards of one array that this process holds."""

  def __init__(self, shape, dtype, sharding):
    self._shape, self._dtype, self._sharding = shape, dtype, sharding
    indices = sharding.addressable_devices_indices_map(shape).values()
    self._buffers = {}
    for key in {self._key(index) for index in indices}:
      self._buffers[key] = _aligned([b - a for a, b in key], dtype)

  def _key(self, index):
    spans = zip(index, self._shape, strict=True)
    return tuple(s.indices(size)[:2] for s, size in spans)

  def _overlaps(self, box) -> Iterator[tuple]:
    """(what a shard and the box share, the shard's part of it)."""
    for key, buffer in self._buffers.items():
      shared = _overlap(box, key)
      if shared is not None:
        where = tuple(
          slice(a - k, b - k) for (a, b), (k, _) in zip(shared, key)
        )
        yield shared, buffer[where]

  def touches(self, box) -> bool:
    return any(self._overlaps(box))

  def view(self, box) -> np.ndarray | None:
    """The place of a box, None if it is not all in one shard."""
    overlaps = list(self._overlaps(box))
    if len(overlaps) != 1:
      return None
    ((shared, view),) = overlaps
    if shared != [(s.start, s.stop) for s in box]:
      return None
    return view

  def fill(self, box, values: np.ndarray) -> None:
    """Copies the values of a box to the shards that hold some of them."""
    for shared, view in self._overlaps(box):
      origin = tuple(
        slice(a - s.start, b - s.start) for (a, b), s in zip(shared, box)
      )
      copy_into(view, values[origin])

  def array(self) -> jax.Array:
    return jax.make_array_from_callback(
      self._shape,
      self._sharding,
      lambda index: self._buffers[self._key(index)],
      dtype=self._dtype,
    )


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """An array with undefined values, as JAX takes it over."""
  size = nbytes(shape, dtype)
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(dtype).reshape(shape)


def _overlap(box, key):
  """The (start, stop) that both share along each axis, None if nothing."""
  spans = [
    (max(s.start, a), min(s.stop, b))
    for s, (a, b) in zip(box, key, strict=True)
  ]
  return None if any(a >= b for a, b in spans) else spans
