"""The conversion table: both ways, bit for bit, and what it refuses."""

import golden
import numpy as np
import pytest

from qwenvl_jax.conversion import layout
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.errors import CheckpointError


def test_fused_rows_go_where_they_belong():
  """Vision rows are interleaved by head, decoder rows are not."""
  tensors = {
    name: tensor.load() for name, tensor in open_released(golden.FOLDER).items()
  }
  vision = golden.config().vision
  name = 'transformer.visual.transformer.resblocks.1.attn.in_proj.weight'
  rows = tensors[name].reshape(vision.heads, 3, vision.head_dim, vision.width)
  rows = rows.astype(np.float32)
  kernels = golden.params()['vision']['blocks']['attn']
  for index, part in enumerate('qkv'):
    kernel = np.asarray(kernels[part]['kernel'])[1]
    np.testing.assert_array_equal(kernel[:, 2], rows[2, index].T)
  decoder = golden.config().decoder
  rows = tensors['transformer.h.0.attn.c_attn.weight'].astype(np.float32)
  keys = rows[decoder.dim : 2 * decoder.dim]
  kernel = golden.params()['decoder']['blocks']['attn']['k']['kernel'][0]
  np.testing.assert_array_equal(
    np.asarray(kernel).reshape(decoder.dim, -1), keys.T
  )


def test_problems_are_named():
  table = layout.rules(golden.config())
  shapes = layout.released_shapes(table)
  shapes.pop('lm_head.weight')
  shapes['transformer.h.9.ln_1.weight'] = (256,)
  shapes['transformer.ln_f.weight'] = (255,)
  with pytest.raises(CheckpointError) as error:
    layout.check_shapes(layout.released_shapes(table), shapes, 'FOLDER')
  for part in (
    'FOLDER',
    '1 missing: lm_head.weight',
    '1 unknown: transformer.h.9.ln_1.weight',
    '1 misshapen: transformer.ln_f.weight is [255], not [256]',
  ):
    assert part in str(error.value)


def test_order_of_the_release():
  names = [n for n, _ in layout.released_order(layout.rules(golden.config()))]
  first, second = 'transformer.h.0.mlp.c_proj.weight', 'transformer.h.1.ln_1'
  assert names.index(first) + 1 == names.index(f'{second}.weight')
  assert len(set(names)) == 61


@pytest.mark.parametrize(
  ('name', 'part'),
  [
    ('lm_head.weight', 'decoder'),
    ('transformer.visual.proj', 'adapter'),
    ('transformer.visual.attn_pool.query', 'adapter'),
    ('transformer.visual.ln_pre.bias', 'vision'),
    ('adapter/proj', 'adapter'),
  ],
)
def test_part_of(name, part):
  assert layout.part_of(name) == part
