"""Counts values that are not finite, as fast as memory is read."""

import collections
from collections.abc import Mapping

import numpy as np

# Stays in a second-level cache.
_TILE = 2**17


def count_not_finite(values: np.ndarray) -> int:
  """Counts NaN and infinite values of an array of floats; 0 of integers.

  Args:
    values: contiguous, of any shape; bfloat16 as well.
  """
  if values.dtype.kind not in 'fV' or not values.size:
    return 0
  kind = np.dtype(f'u{values.dtype.itemsize}')
  infinite = np.array(np.inf, values.dtype).view(kind)
  magnitude = np.array(np.iinfo(kind).max >> 1, kind)
  bits, count = values.reshape(-1).view(kind), 0
  for start in range(0, bits.size, _TILE):
    tile = bits[start : start + _TILE] & magnitude
    if tile.max() >= infinite:
      count += int(np.count_nonzero(tile >= infinite))
  return count


def describe(counts: Mapping[str, int]) -> str | None:
  """Says how many values are not finite and where; None if all are.

  Args:
    counts: by parameter.
  """
  found = collections.Counter(counts)
  total = found.total()
  if not total:
    return None
  worst = [f'{path} ({n:,})' for path, n in found.most_common(5) if n]
  more = ' ..' if len(+found) > len(worst) else ''
  return (
    f'{total:,} values are not finite (NaN or infinite): {", ".join(worst)}'
    f'{more}; the checkpoint is damaged or its training diverged'
  )
