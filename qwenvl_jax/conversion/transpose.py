"""Copies between arrays whose axes are in another order, in cached tiles.

NumPy copies a transposed matrix one value a cache line; through a small buffer
with padded rows it is about ten times as fast.
"""

import numpy as np

# A tile's buffer stays in the second-level cache: 256 x 2048 values.
_WIDTH, _LENGTH = 256, 2048
# Rows whose distance is no power of two do not compete for the same lines.
_PADDING = 32


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
  """`target[...] = source` for equal shapes and dtypes, bit for bit.

  Fast where either side's axes are permuted.

  Args:
    target: any strided array.
    source: of the same shape and dtype.
  """
  # As plain integers: NumPy copies extension types (bfloat16) more slowly.
  kind = np.dtype(f'u{target.dtype.itemsize}')
  _copy(*_merged(target.view(kind), source.view(kind)))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
  inner, outer = _innermost(target), _innermost(source)
  if inner == outer or min(target.shape[inner], target.shape[outer]) < 2:
    np.copyto(target, source)
  elif target.ndim > 2:
    axis = next(a for a in range(target.ndim) if a not in (inner, outer))
    for index in range(target.shape[axis]):
      where = (slice(None),) * axis + (index,)
      _copy(target[where], source[where])
  elif inner == 1:
    _copy_tiles(target, source)
  else:
    _copy_tiles(target.T, source.T)


def _copy_tiles(target: np.ndarray, source: np.ndarray) -> None:
  """Target has contiguous rows, source contiguous columns."""
  rows, columns = target.shape
  length = min(rows, _LENGTH)
  buffer = np.empty((_WIDTH, length + _PADDING), target.dtype)
  for left in range(0, columns, _WIDTH):
    for top in range(0, rows, length):
      part = source[top : top + length, left : left + _WIDTH]
      tile = buffer[: part.shape[1], : part.shape[0]]
      tile[...] = part.T
      target[top : top + length, left : left + _WIDTH] = tile.T


def _innermost(array: np.ndarray) -> int:
  """The axis along which values are closest."""
  return min(range(array.ndim), key=lambda a: abs(array.strides[a]), default=0)


def _merged(target: np.ndarray, source: np.ndarray):
  """Both with neighbouring axes merged where both allow it."""
  shape = []
  for axis, size in enumerate(target.shape):
    if shape and all(
      array.strides[axis - 1] == size * array.strides[axis]
      for array in (target, source)
    ):
      shape[-1] *= size
    else:
      shape.append(size)
  return (
    target.reshape(shape, copy=False),
    source.reshape(shape, copy=False),
  )
