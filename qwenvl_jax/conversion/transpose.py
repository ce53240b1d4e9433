"""Copies between arrays whose axes are in another order, in cached tiles.

NumPy copies a transposed matrix as it is one value a cache line. In tiles that
stay in the caches it is about ten times as fast, if the rows are not a multiple
of a large power of two apart: those would compete for the same lines.
"""

import math

import numpy as np

# A side of a tile: two of 512 x 512 values of bfloat16 fit a second-level cache
# of 1 MiB, one fits a smaller one.
_TILE_BYTES = 1024
_LINE = 64


def row_stride(row_bytes: int) -> int:
  """Gives the distance at which rows are best transposed.

  Args:
    row_bytes: of a row.

  Returns:
    Bytes from one row to the next: an odd number of cache lines, which spreads
    a column over all of a cache.
  """
  lines = -(-row_bytes // _LINE)
  return (lines | 1) * _LINE


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
  side = _TILE_BYTES // target.itemsize
  buffer = None
  if _compete(source.strides[1], min(columns, side)):
    stride = row_stride(min(rows, side) * target.itemsize) // target.itemsize
    buffer = np.empty((min(columns, side), stride), target.dtype)
  for top in range(0, rows, side):
    for left in range(0, columns, side):
      where = slice(top, top + side), slice(left, left + side)
      tile = source[where]
      if buffer is not None:
        spread = buffer[: tile.shape[1], : tile.shape[0]].T
        spread[...] = tile
        tile = spread
      target[where] = tile


def _compete(stride: int, count: int) -> bool:
  """Whether so many lines at a distance share a part of the first cache.

  It has 64 places for a line's address, and room for 8 lines in each.
  """
  if stride % _LINE:
    return False
  places = 64 // math.gcd(stride // _LINE, 64)
  return count > 8 * places


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
