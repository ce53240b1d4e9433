"""Blocks cover the model once, both ways, bit for bit."""

import golden
import numpy as np
import pytest

from qwenvl_jax.conversion import layout
from qwenvl_jax.conversion.blocks import (
  BLOCK_VALUES,
  chunk_shapes,
  covering,
  plan,
)
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
    boxes = block.to_ours(rows)
    for path, box in zip(block.paths, boxes, strict=True):
      assert not params[path][block.box].any()
      params[path][block.box] = box
    block.to_released(boxes, back[block.name][block.start : block.stop])
  for name, tensor in tensors.items():
    assert back[name].tobytes() == tensor.load().tobytes(), name
  expected = golden.released_tensors(table, layout.unflatten(params))
  for name, tensor in tensors.items():
    assert expected[name].tobytes() == tensor.load().tobytes(), name


def test_the_release_in_blocks():
  """Small blocks, each in one chunk of what is stored."""
  table = layout.rules(qwen_vl_7b())
  chunks, values = chunk_shapes(plan(table)), 0
  for block in plan(table):
    assert block.values <= BLOCK_VALUES
    values += block.values
    for path in block.paths:
      for span, chunk in zip(block.box, chunks[path], strict=True):
        assert span.start % chunk == 0
        assert span.stop - span.start <= chunk
  assert values == 9_656_935_168


def test_rows_that_cover_several_parameters():
  """The last rows of the queries and the first ones of the keys."""
  (rule,) = [
    r for r in layout.rules(golden.config()) if 'c_attn.weight' in r.tensor
  ]
  queries, keys = covering(rule, 1, 192, 320)
  assert queries.paths == ('decoder/blocks/attn/q/kernel',)
  assert keys.paths == ('decoder/blocks/attn/k/kernel',)
  assert (queries.start, queries.stop, keys.stop) == (192, 256, 320)
  layer, whole = slice(1, 2), slice(0, 256)
  head_dim = golden.config().decoder.head_dim
  heads = 256 // head_dim
  per_head = slice(0, head_dim)
  assert queries.box == (
    layer,
    whole,
    slice(192 // head_dim, heads),
    per_head,
  )
  assert keys.box == (layer, whole, slice(0, 64 // head_dim), per_head)
