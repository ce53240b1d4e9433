import pathlib

import jax
import jax.numpy as jnp
import pytest

from qwenvl_jax.plan import flops, hlo

GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens/hlo/two_slices.txt'


def program(*lines):
  body = '\n  '.join(lines)
  return hlo.parse(f'ENTRY %main (a: f32[]) -> f32[] {{\n  {body}\n}}\n')


def test_golden_products():
  """Twelve products of [1024,2048] and [2048,2048] a chip."""
  golden = hlo.parse(GOLDEN.read_text())
  assert flops.product_flops(golden) == 12 * 2 * 1024 * 2048 * 2048


@pytest.mark.parametrize(
  ('left', 'right', 'out', 'attributes', 'expected'),
  [
    # A plain product.
    ('8,16', '16,32', '8,32', 'dim_labels=bf_io->bf', 8 * 16 * 32),
    # Four heads as a spatial dimension, of which each meets itself only.
    (
      '4,8,16',
      '4,16,32',
      '4,8,32',
      'window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf',
      4 * 8 * 16 * 32,
    ),
    # Two axes contracted, one of them as a window over all of it.
    (
      '8,4,16',
      '4,16,32',
      '8,1,32',
      'window={size=4}, dim_labels=b0f_0io->b0f',
      8 * 4 * 16 * 32,
    ),
    # An outer product over a spatial axis: padded, nothing multiplies padding.
    (
      '16,8,1',
      '4,16,32',
      '8,4,32',
      'window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=fb0_0io->b0f',
      8 * 4 * 16 * 32,
    ),
    # A convolution of 3 with stride 2: 4 outputs of 3 taps, one on padding.
    (
      '1,8,2',
      '3,2,5',
      '1,4,5',
      'window={size=3 stride=2 pad=1_0}, dim_labels=b0f_0io->b0f',
      (4 * 3 - 1) * 2 * 5,
    ),
  ],
)
def test_convolutions(left, right, out, attributes, expected):
  made = program(
    f'%l = bf16[{left}]{{0}} parameter(0)',
    f'%r = bf16[{right}]{{0}} parameter(1)',
    f'ROOT %c = f32[{out}]{{0}} convolution(%l, %r), {attributes}',
  )
  assert flops.product_flops(made) == 2 * expected


def test_compiled_products_in_loops():
  """The FLOPs of a scan, forward and backward, are those of the arithmetic."""

  def loss(w, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    return jnp.sum(x)

  w = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32)
  x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
  text = jax.jit(jax.grad(loss, (0, 1))).lower(w, x).compile().as_text()
  expected = 3 * 6 * 2 * 32 * 64 * 64
  assert flops.product_flops(hlo.parse(text)) == expected


def splash(kind, op_name, metadata):
  return program(
    '%i = s8[1,2,2]{2,1,0} parameter(0)',
    '%q = bf16[2,4,1024,128]{3,2,1,0} parameter(1)',
    '%k = bf16[2,4,2048,128]{3,2,1,0} parameter(2)',
    '%s = s32[2,1024,128]{2,1,0} parameter(3)',
    f'ROOT %splash_mha_{kind}_segmented.3 = (bf16[2,4,1024,128]{{3,2,1,0}}, '
    'f32[2,4,1024,128]{3,2,1,0}) custom-call(%i, %q, %k, %k, %s), '
    'custom_call_target="tpu_custom_call", frontend_attributes='
    f'{{kernel_metadata={{"xprof_metadata":"{{{metadata}}}"}}}}, '
    f'metadata={{op_name="jit(step)/{op_name}/pallas_call"}}',
  )


@pytest.mark.parametrize(
  ('kind', 'products', 'fused'),
  [('fwd', 2, False), ('dq', 3, False), ('dkv', 4, False), ('dkv', 5, True)],
)
def test_attention_kernels(kind, products, fused):
  blocks = f'\\"use_fused_bwd_kernel\\": {str(fused).lower()}'
  one = 2 * 2 * 4 * 1024 * 2048 * 128
  assert flops.kernel_flops(splash(kind, 'vision/blocks', blocks)) == (
    products * one,
    [],
  )


def test_causal_kernels_skip_blocks_above_the_diagonal():
  """Of 2 x 4 blocks of 512, 1 and 2 lie on or below the diagonal."""
  blocks = r'\"block_q\": 512, \"block_kv\": 512'
  made = splash('fwd', 'jvp(QwenVL)/decoder/while/body/blocks', blocks)
  whole = 2 * 2 * 2 * 4 * 1024 * 2048 * 128
  assert flops.kernel_flops(made)[0] == whole * 3 / 8


def test_decode_attention():
  """Two products with each key; keys, values and scales are read."""
  made = program(
    '%n = s32[]{} parameter(0)',
    '%l = s32[8]{0} parameter(1)',
    '%q = bf16[8,4,128]{2,1,0} parameter(2)',
    '%k = s8[8,4,512,128]{3,2,1,0} parameter(3)',
    '%s = f32[8,4,512]{2,1,0} parameter(4)',
    'ROOT %decode_attention.3 = (bf16[8,4,128]{2,1,0}, '
    's8[8,4,512,128]{3,2,1,0}) custom-call(%n, %l, %q, %k, %k, %s, %s), '
    'custom_call_target="tpu_custom_call"',
  )
  assert flops.kernel_flops(made) == (4 * 8 * 4 * 512 * 128, [])
  main = made.computations['main']
  assert flops.decode_attention_bytes(main.root, main) == (
    2 * 8 * 4 * 512 * (128 + 4)
  )


def test_kernels_without_a_formula_are_named():
  made = program(
    '%q = bf16[8,8]{1,0} parameter(0)',
    'ROOT %my_kernel.1 = bf16[8,8]{1,0} custom-call(%q), '
    'custom_call_target="tpu_custom_call"',
  )
  assert flops.kernel_flops(made) == (0.0, ['my_kernel.1'])
