"""The model in blocks of a few megabytes, the unit of every conversion.

A block is a contiguous range of rows of a released tensor (or a few whole small
ones of neighbouring layers), and the box of our stacked parameters that these
values fill. Reading, transposing and writing one block after the other converts
a model of any size in little memory, and nothing has to be read before the
first write.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

import einops
import numpy as np

from qwenvl_jax.conversion.rules import FUSED, Rule
from qwenvl_jax.conversion.transpose import copy_into

# 16 MiB in bfloat16. TensorStore and numpy get larger buffers from the kernel
# anew each time, which costs more than filling them.
BLOCK_VALUES = 8 * 1024**2


@dataclasses.dataclass(frozen=True)
class Block:
  """A piece of the model.

  Attributes:
    names: the released tensors, one a layer.
    start: first row of each of them.
    stop: last row + 1.
    row_shape: of one row, () for vectors.
    paths: the parameters; several if the rows belong to them in turn.
    box: where in each of these parameters, one slice an axis.
    pattern: einops' from the rows to one layer's boxes.
    sizes: of the axes in `pattern`.
    stacked: whether the parameters have a leading axis of layers.
  """

  names: tuple[str, ...]
  start: int
  stop: int
  row_shape: tuple[int, ...]
  paths: tuple[str, ...]
  box: tuple[slice, ...]
  pattern: str
  sizes: dict[str, int]
  stacked: bool

  @property
  def box_shape(self) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in self.box)

  @property
  def values(self) -> int:
    """How many values the block holds."""
    return len(self.paths) * math.prod(self.box_shape)

  @property
  def outer_axis(self) -> int:
    """Of the parameters, the axis that follows the released rows."""
    names = self.pattern.split(' -> ')[1].split()[-len(self.box_shape) :]
    if self.stacked:
      names = ['layer', *names[1:]]
    return names.index(_outer(self.pattern))

  def until(self, stop: int) -> 'Block':
    """The block without its rows from `stop` on."""
    axis, at = _outer(self.pattern), self.outer_axis
    count = self.sizes[axis] * (stop - self.start) // (self.stop - self.start)
    cut = slice(self.box[at].start, self.box[at].start + count)
    return dataclasses.replace(
      self,
      stop=stop,
      box=(*self.box[:at], cut, *self.box[at + 1 :]),
      sizes=self.sizes | {axis: count},
    )

  def released_view(self, box: np.ndarray) -> np.ndarray | None:
    """The rows that one layer's box is, where memory has them as released.

    Args:
      box: of the only path, without an axis of layers, with any strides.

    Returns:
      [stop - start, *row_shape] in the same memory, or None.
    """
    if len(self.paths) > 1:
      return None
    released, ours = self.pattern.split(' -> ')
    rows = einops.rearrange(box, f'{ours} -> {released}', **self.sizes)
    same = np.may_share_memory(rows, box) and rows.flags.c_contiguous
    return rows if same else None

  def to_ours(
    self, tensors: Iterable[np.ndarray], boxes: Iterable[np.ndarray]
  ) -> None:
    """Rows of each released tensor to the box of each path.

    Args:
      tensors: [stop - start, *row_shape] for each of `names`. One is used up
        before the next is asked for.
      boxes: filled, [*box_shape] for each of `paths`.
    """
    boxes = list(boxes)
    for layer, rows in enumerate(tensors):
      for target, view in zip(boxes, self._ours(rows), strict=True):
        copy_into(target[layer] if self.stacked else target, view)

  def to_released(self, boxes: Iterable[np.ndarray]) -> list[np.ndarray]:
    """The inverse of `to_ours`."""
    boxes = list(boxes)
    result = []
    for layer in range(len(self.names)):
      rows = np.empty((self.stop - self.start, *self.row_shape), boxes[0].dtype)
      for source, view in zip(boxes, self._ours(rows), strict=True):
        copy_into(view, source[layer] if self.stacked else source)
      result.append(rows)
    return result

  def _ours(self, rows: np.ndarray) -> list[np.ndarray]:
    """Views of released rows, as our axes are."""
    view = einops.rearrange(rows, self.pattern, **self.sizes)
    return list(view) if len(self.paths) > 1 else [view]


def _outer(pattern: str) -> str:
  """The outermost axis of released rows, along which they may be cut."""
  return re.search(r'\w+', pattern)[0]


def plan(table: Iterable[Rule], limit: int = BLOCK_VALUES) -> Iterator[Block]:
  """All blocks of a conversion table.

  The blocks of a path tile it with one shape (but for its edges), which thus
  serves as the shape of the chunks that are stored.

  Args:
    table: from `layout.rules`.
    limit: values in a block; exceeded only by a single row.
  """
  for rule in table:
    for piece in _pieces(rule):
      yield from piece.blocks(limit)


def chunk_shapes(
  table: Iterable[Rule], limit: int = BLOCK_VALUES
) -> dict[str, tuple[int, ...]]:
  """Path to the shape of its blocks."""
  shapes = {}
  for block in plan(table, limit):
    for path in block.paths:
      shapes.setdefault(path, block.box_shape)
  return shapes


@dataclasses.dataclass(frozen=True)
class _Piece:
  """Rows of a rule's tensors that fill all of some paths."""

  rule: Rule
  first_row: int
  rows: int
  paths: tuple[str, ...]
  pattern: str
  sizes: dict[str, int]

  def blocks(self, limit: int) -> Iterator[Block]:
    layers = 1 if self.rule.layers is None else self.rule.layers
    size = self.rows * math.prod(self.rule.shape[1:])
    if size <= limit:
      at_once, parts = min(layers, limit // size), 1
    else:
      at_once, parts = 1, math.ceil(size / limit)
    axis = _outer(self.pattern)
    length = self.sizes[axis]
    step = math.ceil(length / parts)
    for layer in range(0, layers, at_once):
      until = min(layer + at_once, layers)
      for begin in range(0, length, step):
        cut = slice(begin, min(begin + step, length))
        yield self._block(layer, until, axis, cut)

  def _block(self, layer: int, until: int, axis: str, cut: slice) -> Block:
    rows_each = self.rows // self.sizes[axis]
    sizes = self.sizes | {axis: cut.stop - cut.start}
    ours = self.pattern.split(' -> ')[1].split()
    if len(self.paths) > 1:
      ours = ours[1:]
    box = tuple(cut if a == axis else slice(0, sizes[a]) for a in ours)
    names = self.rule.released_names()[layer:until]
    stacked = self.rule.layers is not None
    return Block(
      names=tuple(names),
      start=self.first_row + cut.start * rows_each,
      stop=self.first_row + cut.stop * rows_each,
      row_shape=self.rule.shape[1:],
      paths=self.paths,
      box=(slice(layer, until), *box) if stacked else box,
      pattern=self.pattern,
      sizes=sizes,
      stacked=stacked,
    )


def _pieces(rule: Rule) -> Iterator[_Piece]:
  """A rule, or one piece a path where its rows are one path after the other."""
  sizes = rule.sizes
  rows = rule.shape[0]
  if not rule.pattern.startswith(f'({FUSED} '):
    yield _Piece(rule, 0, rows, rule.paths, rule.pattern, sizes)
    return
  pattern = rule.pattern.replace(f'{FUSED} ', '')
  sizes = {axis: size for axis, size in sizes.items() if axis != FUSED}
  rows //= len(rule.paths)
  for index, path in enumerate(rule.paths):
    yield _Piece(rule, index * rows, rows, (path,), pattern, sizes)
