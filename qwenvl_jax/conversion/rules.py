"""The mechanism of conversion tables: released tensor <-> parameter paths.

A rule's pattern is einops', from the released axes to ours, in words:
`'(heads head_dim) dim -> dim heads head_dim'`. A leading `qkv` on our side is
the fused axis that splits over several paths (`attn/{q,k,v}`).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import einops
import numpy as np

# The axis of a fused tensor that becomes several parameters.
FUSED = 'qkv'

# (released name, parameter path, pattern), `{q,k,v}` for several paths.
Row = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one kind of released tensor maps to parameters.

  Attributes:
    tensor: released name, `*` for the layer.
    paths: parameter paths; more than one if the released tensor is fused.
    pattern: einops pattern from released to ours; `qkv` enumerates `paths`.
    sizes: names of axes in `pattern` to their lengths.
    layers: how many layers are stacked, None if the tensor stands alone.
  """

  tensor: str
  paths: tuple[str, ...]
  pattern: str
  sizes: dict[str, int]
  layers: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the released tensor."""
    released = self.pattern.split(' -> ')[0]
    return tuple(
      math.prod(self.sizes[axis] for axis in re.findall(r'\w+', group))
      for group in re.findall(r'\(.*?\)|\w+', released)
    )

  def released_names(self) -> list[str]:
    """Names of the released tensors under this rule, by layer."""
    if self.layers is None:
      return [self.tensor]
    return [self.tensor.replace('*', str(i)) for i in range(self.layers)]

  def to_ours(self, tensor: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rearranges one released tensor to one array a path. Views."""
    result = einops.rearrange(tensor, self.pattern, **self.sizes)
    return tuple(result) if len(self.paths) > 1 else (result,)

  def to_released(self, *arrays: np.ndarray) -> np.ndarray:
    """Inverts `to_ours`."""
    stacked = np.stack(arrays) if len(self.paths) > 1 else arrays[0]
    left, right = self.pattern.split(' -> ')
    return einops.rearrange(stacked, f'{right} -> {left}', **self.sizes)


def nbytes(shape: Iterable[int], dtype: np.dtype) -> int:
  """Bytes of an array."""
  return math.prod(shape) * np.dtype(dtype).itemsize


def make_rules(
  rows: tuple[Row, ...],
  sizes: Mapping[str, int],
  released: str = '',
  ours: str = '',
  layers: int | None = None,
) -> Iterator[Rule]:
  """Makes the rules of a table.

  Args:
    rows: of the table.
    sizes: lengths of all axes that its patterns name.
    released: what stands before each released name.
    ours: what stands before each parameter path.
    layers: see `Rule`.
  """
  for tensor, path, pattern in rows:
    axes = set(re.findall(r'\w+', pattern))
    yield Rule(
      tensor=released + tensor,
      paths=tuple(_expand(ours + path)),
      pattern=pattern,
      sizes={axis: size for axis, size in sizes.items() if axis in axes},
      layers=layers,
    )


def _expand(path: str) -> list[str]:
  """'a/{q,k}/b' to ['a/q/b', 'a/k/b']."""
  match = re.search(r'\{(.*?)\}', path)
  if not match:
    return [path]
  return [path.replace(match[0], part) for part in match[1].split(',')]
