"""Position tables of patches and queries: their making and resizing."""

import jax
import jax.numpy as jnp
import numpy as np

# Cubic coefficient of torch's bicubic interpolation; Keys' -0.5 is PIL's.
_CUBIC = -0.75


def sincos_positions(grid: int, dim: int) -> np.ndarray:
  """Fixed position table of the queries.

  Args:
    grid: queries a side.
    dim: channels, a multiple of 4. The first half encodes the column, the
      second the row; each is [sin | cos] with frequencies
      10000**(-2i / (dim/2)).

  Returns:
    [grid*grid, dim] float32, raster order.
  """
  quarter = dim // 4
  frequencies = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
  angles = np.arange(grid, dtype=np.float64)[:, None] * frequencies
  line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  columns = np.broadcast_to(line[None, :], (grid, grid, dim // 2))
  rows = np.broadcast_to(line[:, None], (grid, grid, dim // 2))
  table = np.concatenate([columns, rows], axis=2)
  return table.reshape(grid * grid, dim).astype(np.float32)


def _resize_matrix(source: int, target: int) -> np.ndarray:
  """[target, source] float32 weights of a 1-D bicubic resize.

  Half-pixel centres, no antialiasing, edges repeated: torch's
  `interpolate(mode='bicubic', align_corners=False)`.
  """
  position = (np.arange(target) + 0.5) * (source / target) - 0.5
  first = np.floor(position).astype(int) - 1
  weights = np.zeros((target, source), np.float64)
  for tap in range(4):
    x = np.abs(position - (first + tap))
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    index = np.clip(first + tap, 0, source - 1)
    np.add.at(weights, (np.arange(target), index), np.where(x <= 1, near, far))
  return weights.astype(np.float32)


def resize_positions(table, grid: tuple[int, int]) -> jax.Array:
  """Resizes a square position table to a patch grid, in float32.

  Args:
    table: [S*S,D].
    grid: (rows, columns) of patches.

  Returns:
    [rows*columns,D], dtype of `table`; the table itself when the grid fits.
  """
  side = int(table.shape[0] ** 0.5 + 0.5)
  if grid == (side, side):
    return table
  square = table.astype(jnp.float32).reshape(side, side, -1)
  resized = jnp.einsum(
    'rh,hwd,cw->rcd',
    _resize_matrix(side, grid[0]),
    square,
    _resize_matrix(side, grid[1]),
    precision=jax.lax.Precision.HIGHEST,
  )
  return resized.reshape(-1, table.shape[1]).astype(table.dtype)
