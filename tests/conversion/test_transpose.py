"""Copies in tiles are copies."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from qwenvl_jax.conversion.transpose import copy_into


@pytest.mark.parametrize(
  'shape', [(300, 2100), (5, 7, 9), (257, 3, 410), (1, 40), (2, 3, 4, 5)]
)
@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float32])
def test_every_order_of_axes(shape, dtype):
  size = np.dtype(dtype).itemsize
  bits = np.random.default_rng(0).integers(0, 256, (*shape, size), np.uint8)
  source = bits.view(dtype)[..., 0]
  for axes in itertools.permutations(range(len(shape))):
    target = np.empty([shape[a] for a in axes], dtype)
    copy_into(target, source.transpose(axes))
    assert target.tobytes() == source.transpose(axes).tobytes()
    back = np.empty_like(source)
    copy_into(back.transpose(axes), target)
    assert back.tobytes() == source.tobytes()
