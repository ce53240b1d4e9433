"""Copies between arrays whose axes are in another order, in cached tiles.

NumPy copies a transposed matrix as it is one value a cache line. In tiles that
stay in the caches it is about ten times as fast. Rows that are a multiple of a
large power of two apart would compete for the same lines there, so that a tile
is copied to a place of its own first.
"""

import numpy as np

# A side of a tile: two of 512 x 512 values of bfloat16 fit a second-level cache
# of 1 MiB, one fits a smaller one.
_TILE_BYTES = 1024
_LINE = 64


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
  # Rows an odd number of lines apart: a column spreads over all of a cache.
  buffer = np.empty((side, side + _LINE // target.itemsize), target.dtype)
  for top in range(0, rows, side):
    for left in range(0, columns, side):
      where = slice(top, top + side), slice(left, left + side)
      tile = source[where]
      spread = buffer[: tile.shape[1], : tile.shape[0]].T
      spread[...] = tile
      target[where] = spread


def _innermost(array: np.ndarray) -> int:
  """The axis along which values are closest."""
  return min(range(array.ndim), key=lambda a: abs(array.strides[a]), default=0)


def _merged(target: np.ndarray, source: np.ndarray):
  """Both with neighbouring axes merged where both allow it."""
  # An axis of one value has a stride that means nothing.
  target, source = np.squeeze(target), np.squeeze(source)
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
