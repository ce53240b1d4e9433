"""Blocks cover the model once, both ways, bit for bit."""

import golden
import numpy as np
import pytest

from qwenvl_jax.conversion import layout
from qwenvl_jax.conversion.blocks import BLOCK_VALUES, chunk_shapes, plan
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.model.config import qwen_vl_7b


@pytest.mark.parametrize('limit', [1000, 30_000, BLOCK_VALUES])
def test_there_and_back(limit):
  """Into stacked parameters and out of them again, through any block size."""
  tensors = open_released(golden.FOLDER)
  table = layout.rules(golden.config())
  params = {
    path: np.zeros(shape, 'bfloat16')
    for path, shape in layout.parameter_shapes(golden.config()).items()
  }
  back = {name: np.zeros(x.shape, x.dtype) for name, x in tensors.items()}
  for block in plan(table, limit):
    rows = tensors[block.name].read(block.start, block.stop)
    boxes = [np.empty(block.box_shape, 'bfloat16') for _ in block.paths]
    block.to_ours(rows, boxes)
    for path, box in zip(block.paths, boxes, strict=True):
      assert not params[path][block.box].any()
      params[path][block.box] = box
    part = block.to_released(boxes)
    back[block.name][block.start : block.stop] = part
  for name, tensor in tensors.items():
    assert back[name].tobytes() == tensor.load().tobytes(), name
  expected = golden.released_tensors(table, layout.unflatten(params))
  for name, tensor in tensors.items():
    assert expected[name].tobytes() == tensor.load().tobytes(), name


def test_the_release_in_blocks():
  """Small blocks, each in one chunk of what is stored."""
  table = layout.rules(qwen_vl_7b())
  chunks, values = chunk_shapes(table), 0
  for block in plan(table):
    assert block.values <= BLOCK_VALUES
    values += block.values
    for path in block.paths:
      for span, chunk in zip(block.box, chunks[path], strict=True):
        assert span.start % chunk == 0
        assert span.stop - span.start <= chunk
  assert values == 9_656_935_168


def test_block_without_its_last_rows():
  table = [r for r in layout.rules(golden.config()) if 'lm_head' in r.tensor]
  (block,) = plan(table)
  short = block.until(100)
  assert (short.start, short.stop) == (0, 100)
  assert short.box_shape == (256, 100)
  rows = np.arange(100 * 256, dtype=np.float32).reshape(100, 256)
  box = np.empty((256, 100), np.float32)
  short.to_ours(rows, [box])
  np.testing.assert_array_equal(box, rows.T)
