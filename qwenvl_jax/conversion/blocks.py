"""The model in blocks of a few megabytes, the unit of every conversion.

A block is a contiguous range of rows of a released tensor, and the box of our
stacked parameters that these values fill. Reading, transposing and writing one
block after the other converts a model of any size in little memory, and nothing
has to be read before the first write.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
  FIRST_COMPLETED,
  ThreadPoolExecutor,
  as_completed,
  wait,
)
from typing import Any

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
    paths: the parameters; several if the rows belong to them in turn.
    box: where in each of these parameters, one slice an axis.
    pattern: einops' from the rows to one layer's boxes.
    sizes: of the axes in `pattern`.
  """

  name: str
  layer: int | None
  start: int
  stop: int
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

  def views(self, rows: np.ndarray) -> list[np.ndarray]:
    """Released rows with the axes of our boxes, one for each of `paths`.

    Args:
      rows: [stop - start, ...] of the released tensor.
    """
    view = einops.rearrange(rows, self.pattern, **self.sizes)
    views = list(view) if len(self.paths) > 1 else [view]
    return views if self.layer is None else [x[None] for x in views]

  def to_ours(self, rows: np.ndarray) -> list[np.ndarray]:
    """Copies released rows to boxes [*box_shape], C-ordered.

    Args:
      rows: [stop - start, ...] of the released tensor.
    """
    boxes = [np.empty(self.box_shape, rows.dtype) for _ in self.paths]
    for box, view in zip(boxes, self.views(rows), strict=True):
      copy_into(box, view)
    return boxes

  def to_released(self, boxes: Sequence[np.ndarray], rows: np.ndarray) -> None:
    """Fills `rows` with what `to_ours` makes of them.

    Args:
      boxes: [*box_shape], one for each of `paths`.
      rows: [stop - start, ...] of the released tensor.
    """
    for box, view in zip(boxes, self.views(rows), strict=True):
      copy_into(view, box)


def covering(
  rule: Rule, layer: int | None, start: int, stop: int
) -> Iterator[Block]:
  """The blocks that rows of a tensor are, however large.

  Args:
    rule: of the tensor.
    layer: of which layer, None if it stands alone.
    start: first row; the outermost axis of the rows may be cut there.
    stop: last row + 1, as well.
  """
  fused = rule.pattern.startswith(f'({FUSED} ')
  pattern, groups = rule.pattern, [rule.paths]
  if fused:  # Rows of one path after the other.
    pattern = pattern.replace(f'{FUSED} ', '')
    groups = [(path,) for path in rule.paths]
  rows = rule.shape[0] // len(groups)
  outer = re.search(r'\w+', pattern)[0]
  rows_each = rows // rule.sizes[outer]
  axes = [a for a in pattern.split(' -> ')[1].split() if a != FUSED]
  stack = () if layer is None else (slice(layer, layer + 1),)
  for index in range(start // rows, -(-stop // rows)):
    first = max(start, index * rows)
    last = min(stop, (index + 1) * rows)
    cut = slice(
      (first - index * rows) // rows_each, (last - index * rows) // rows_each
    )
    box = (cut if a == outer else slice(0, rule.sizes[a]) for a in axes)
    sizes = rule.sizes | {outer: cut.stop - cut.start}
    if fused:
      del sizes[FUSED]
    yield Block(
      name=rule.released_names()[layer or 0],
      layer=layer,
      start=first,
      stop=last,
      paths=groups[index],
      box=(*stack, *box),
      pattern=pattern,
      sizes=sizes,
    )


def plan(table: Iterable[Rule], limit: int = BLOCK_VALUES) -> Iterator[Block]:
  """All blocks of a conversion table.

  The blocks of a path tile it with one shape (but for its edges), which thus
  serves as the shape of the chunks that are stored.

  Args:
    table: from `layout.rules`.
    limit: values in a block; exceeded only by a single row.
  """
  for rule in table:
    for layer in [None] if rule.layers is None else range(rule.layers):
      for whole in covering(rule, layer, 0, rule.shape[0]):
        length = whole.sizes[re.search(r'\w+', whole.pattern)[0]]
        rows_each = (whole.stop - whole.start) // length
        step = math.ceil(length / math.ceil(whole.values / limit)) * rows_each
        for start in range(whole.start, whole.stop, step):
          stop = min(start + step, whole.stop)
          yield from covering(rule, layer, start, stop)


def chunk_shapes(blocks: Iterable[Block]) -> dict[str, tuple[int, ...]]:
  """Path to the shape of its blocks."""
  shapes = {}
  for block in blocks:
    for path in block.paths:
      shapes.setdefault(path, block.box_shape)
  return shapes


def in_threads(
  function: Callable[[Any], Any], items: Iterable, threads: int
) -> Iterator:
  """Yields what a function gives for items, in the order in which it is done.

  Args:
    function: called in several threads; what it raises is raised here.
    items: gone through in this thread, a few ahead of what is yielded.
    threads: how many.
  """
  running, pool = set(), ThreadPoolExecutor(threads)
  try:
    for item in items:
      running.add(pool.submit(function, item))
      if len(running) > 2 * threads:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in finished)
    yield from (future.result() for future in as_completed(running))
  finally:
    pool.shutdown(cancel_futures=True)
