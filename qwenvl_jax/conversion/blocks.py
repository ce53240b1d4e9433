"""The model in blocks of a few megabytes, the unit of every conversion.

A block is a contiguous range of rows of a released tensor, and the box of our
stacked parameters that these values fill. Reading, transposing and writing one
block after the other converts a model of any size in little memory, and nothing
has to be read before the first write.
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
    name: the released tensor.
    layer: its layer, None if it stands alone; then the parameters have no
      leading axis of layers.
    start: first row.
    stop: last row + 1.
    row_shape: of one row, () for vectors.
    paths: the parameters; several if the rows belong to them in turn.
    box: where in each of these parameters, one slice an axis.
    pattern: einops' from the rows to one layer's boxes.
    sizes: of the axes in `pattern`.
  """

  name: str
  layer: int | None
  start: int
  stop: int
  row_shape: tuple[int, ...]
  paths: tuple[str, ...]
  box: tuple[slice, ...]
  pattern: str
  sizes: dict[str, int]

  @property
  def box_shape(self) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in self.box)

  @property
  def values(self) -> int:
    """How many values the block holds."""
    return len(self.paths) * math.prod(self.box_shape)

  @property
  def outer_axis(self) -> int:
    """Of a parameter without layers, the axis that follows the rows."""
    ours = self.pattern.split(' -> ')[1].split()
    return ours.index(_outer(self.pattern))

  def until(self, stop: int) -> 'Block':
    """A block without layers, without its rows from `stop` on."""
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
    """The rows that a box is, where memory has them as released.

    Args:
      box: [*box_shape] of the only path, with any strides.

    Returns:
      [stop - start, *row_shape] in the same memory, or None.
    """
    if len(self.paths) > 1:
      return None
    released, ours = self.pattern.split(' -> ')
    box = self._of_layer(box)
    rows = einops.rearrange(box, f'{ours} -> {released}', **self.sizes)
    same = np.may_share_memory(rows, box) and rows.flags.c_contiguous
    return rows if same else None

  def to_ours(self, rows: np.ndarray, boxes: Iterable[np.ndarray]) -> None:
    """Fills boxes with released rows.

    Args:
      rows: [stop - start, *row_shape].
      boxes: [*box_shape] for each of `paths`.
    """
    for box, view in zip(boxes, self._ours(rows), strict=True):
      copy_into(self._of_layer(box), view)

  def to_released(self, boxes: Iterable[np.ndarray]) -> np.ndarray:
    """The inverse of `to_ours`."""
    boxes = list(boxes)
    rows = np.empty((self.stop - self.start, *self.row_shape), boxes[0].dtype)
    for box, view in zip(boxes, self._ours(rows), strict=True):
      copy_into(view, self._of_layer(box))
    return rows

  def _ours(self, rows: np.ndarray) -> list[np.ndarray]:
    """Views of released rows, as our axes are."""
    view = einops.rearrange(rows, self.pattern, **self.sizes)
    return list(view) if len(self.paths) > 1 else [view]

  def _of_layer(self, box: np.ndarray) -> np.ndarray:
    return box if self.layer is None else box[0]


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
      for layer, name in enumerate(rule.released_names()):
        layer = None if rule.layers is None else layer
        yield from _cut(piece, layer, name, limit)


def chunk_shapes(table: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
  """Path to the shape of its blocks."""
  shapes = {}
  for block in plan(table):
    for path in block.paths:
      shapes.setdefault(path, block.box_shape)
  return shapes


def _pieces(rule: Rule) -> Iterator[Block]:
  """Blocks of all rows that fill all of some paths, of no layer yet."""
  fused = rule.pattern.startswith(f'({FUSED} ')
  pattern, sizes = rule.pattern, dict(rule.sizes)
  if fused:  # Rows of one path after the other.
    pattern = pattern.replace(f'{FUSED} ', '')
    del sizes[FUSED]
  groups = [(path,) for path in rule.paths] if fused else [rule.paths]
  rows = rule.shape[0] // len(groups)
  axes = pattern.split(' -> ')[1].split()
  axes = axes[1:] if axes[0] == FUSED else axes
  for index, paths in enumerate(groups):
    yield Block(
      name=rule.tensor,
      layer=None,
      start=index * rows,
      stop=(index + 1) * rows,
      row_shape=rule.shape[1:],
      paths=paths,
      box=tuple(slice(0, sizes[axis]) for axis in axes),
      pattern=pattern,
      sizes=sizes,
    )


def _cut(
  piece: Block, layer: int | None, name: str, limit: int
) -> Iterator[Block]:
  """Blocks of at most so many values of a layer."""
  axis = _outer(piece.pattern)
  length = piece.sizes[axis]
  rows_each = (piece.stop - piece.start) // length
  axes = piece.pattern.split(' -> ')[1].split()[-len(piece.box) :]
  stack = () if layer is None else (slice(layer, layer + 1),)
  step = math.ceil(length / math.ceil(piece.values / limit))
  for begin in range(0, length, step):
    cut = slice(begin, min(begin + step, length))
    box = (cut if a == axis else s for a, s in zip(axes, piece.box))
    yield dataclasses.replace(
      piece,
      name=name,
      layer=layer,
      start=piece.start + cut.start * rows_each,
      stop=piece.start + cut.stop * rows_each,
      box=(*stack, *box),
      sizes=piece.sizes | {axis: cut.stop - cut.start},
    )
