"""Packed kernels: their values, their products, and what they take."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer.programs import programs
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
  qwen_vl_7b,
)
from qwenvl_jax.model.int4 import Int4Kernel, dequantized
from qwenvl_jax.train.objective import NextToken

INT4 = pathlib.Path(__file__).parents[1] / 'goldens' / 'int4'


def packed(values, axis):
  """4-bit values to words, one value after the other."""
  values = np.moveaxis(values, axis, -1)
  words = np.zeros((*values.shape[:-1], values.shape[-1] // 8), np.uint32)
  for i in range(8):
    words |= values[..., i::8].astype(np.uint32) << np.uint32(4 * i)
  return np.moveaxis(words, -1, axis).view(np.int32)


@pytest.fixture
def kernel():
  """Parts of a packed [32,3,8], groups of 16, and its values."""
  rng = np.random.default_rng(0)
  values = rng.integers(0, 16, (32, 3, 8))
  zeros = rng.integers(0, 16, (2, 3, 8))  # Less one, as they are stored.
  scales = rng.normal(size=(2, 3, 8)).astype(np.float16)
  whole = np.repeat(scales.astype(np.float32), 16, axis=0) * (
    values - np.repeat(zeros + 1, 16, axis=0)
  )
  return (packed(values, 0), packed(zeros, 2), scales), whole


def test_values(kernel):
  parts, whole = kernel
  values = np.asarray(dequantized(*map(jnp.asarray, parts)))
  for i in range(32):
    np.testing.assert_array_equal(values[i % 8, i // 8], whole[i])


@pytest.mark.parametrize('inputs', [(32,), (2, 16)])
def test_product(kernel, inputs):
  parts, whole = kernel
  names = ('embed', 'heads', 'head_dim', 'mlp')
  module = Int4Kernel(
    (*inputs, 3, 8), names[: len(inputs) + 2], len(inputs), 16, jnp.float32
  )
  x = np.random.default_rng(1).normal(size=(2, 5, *inputs)).astype(np.float32)
  params = dict(zip(('words', 'zeros', 'scales'), parts, strict=True))
  y = module.apply({'params': params}, x)
  wanted = np.einsum('bti,inh->btnh', x.reshape(2, 5, 32), whole)
  np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def kernels_and_others(config):
  """Bytes of the blocks' kernels and of all other parameters."""
  shapes = jax.eval_shape(NextToken(config).init, jax.random.key(0))
  found = {True: 0, False: 0}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    path = jax.tree_util.keystr(path)
    inside = "['decoder']['blocks']" in path and "['kernel']" in path
    found[inside] += leaf.size * leaf.dtype.itemsize
  return found[True], found[False]


def test_half_a_byte_a_weight_at_full_size():
  """And a scale of 2 bytes and half a byte of zero point a group."""
  plain = qwen_vl_7b(param_dtype='bfloat16')
  kept = plain.replace(
    decoder=dataclasses.replace(plain.decoder, int4_group=128)
  )
  kernels, others = kernels_and_others(plain)
  packed_kernels, same = kernels_and_others(kept)
  weights = kernels // 2
  assert weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
  assert packed_kernels == weights / 2 + weights / 128 * 2.5
  assert same == others
  assert packed_kernels + same < 0.51 * (kernels + others)


def test_decoding_holds_no_dequantized_model():
  """Of 16 layers, the kernels of one or two are ever there."""
  config = QwenVLConfig(
    VisionConfig(28, width=32, layers=1, heads=2, mlp_dim=64, position_grid=2),
    AdapterConfig(queries=4, dim=256, heads=2),
    DecoderConfig(512, 256, 16, 4, 64, 512, int4_group=128),
    image_start_id=500,
    remat='none',
    scan_layers=False,
  )
  params = nn.meta.unbox(
    jax.eval_shape(NextToken(config).init, jax.random.key(0))
  )
  decoder = config.decoder
  # In float32, which a CPU multiplies bfloat16 in.
  layer = 4 * (4 * decoder.dim**2 + 3 * decoder.dim * decoder.mlp_dim)
  engine = programs(config)
  state = jax.eval_shape(lambda: engine.init_state(1, 32))
  memory = engine.forward.lower(params, state).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2 * layer


@pytest.mark.parametrize(
  ('sizes', 'said'),
  [
    ({'int4_group': 100}, 'multiple of 8 that divides'),
    ({'int4_group': 512}, 'that divides the inputs .* 11008'),
    ({'int4_group': 0}, 'multiple of 8'),
    ({'int4_group': 8, 'heads': 2, 'head_dim': 12}, 'zero points make a word'),
  ],
)
def test_groups_that_do_not_fit(sizes, said):
  with pytest.raises(ConfigError, match=f'DecoderConfig.int4_group.*{said}'):
    DecoderConfig(**sizes)


def test_formats_that_are_none():
  with pytest.raises(ConfigError, match='int4_zero_offset=2 is neither 1'):
    DecoderConfig(int4_zero_offset=2)


SHARDED = """
import jax, numpy as np
import qwenvl_jax
from qwenvl_jax.sharding import MeshConfig, make_mesh, use_mesh

# A row for each shard of the batch.
ids = np.tile(np.load({folder!r} + '/expected.npz')['ids'], (2, 1))
alone = qwenvl_jax.load({folder!r}, 'float32', keep_int4=True)
wanted = np.asarray(alone.logits(ids))
new = alone.generate(ids[:, :9], max_new_tokens=4)
for sizes in ((1, 2, 2), (1, 4, 1)):
  with use_mesh(make_mesh(MeshConfig(*sizes))):
    split = qwenvl_jax.load({folder!r}, 'float32', keep_int4=True)
    blocks = split.params['decoder']['blocks_1']
    for path, x in jax.tree_util.tree_leaves_with_path(blocks):
      if path[-1].key == 'words':
        part = np.prod(x.sharding.shard_shape(x.shape))
        assert part * sizes[1] * sizes[2] == x.size, (sizes, path)
    error = np.abs(np.asarray(split.logits(ids)) - wanted).max()
    assert error < 5e-5, (sizes, error)
    assert split.generate(ids[:, :9], max_new_tokens=4) == new
"""


@pytest.mark.slow
def test_sharded_like_plain_kernels(run_on_devices):
  run_on_devices(4, SHARDED.format(folder=str(INT4)))


@pytest.mark.parametrize('inputs', [(32,), (2, 16)])
def test_gradient_of_the_inputs(kernel, inputs):
  """That of the dequantized kernel, which is made again for it."""
  parts, whole = kernel
  names = ('embed', 'heads', 'head_dim', 'mlp')
  shape = (*inputs, 3, 8)
  module = Int4Kernel(shape, names[: len(shape)], len(inputs), 16, jnp.float32)
  params = dict(zip(('words', 'zeros', 'scales'), parts, strict=True))
  rng = np.random.default_rng(1)
  x = rng.normal(size=(5, *inputs)).astype(np.float32)
  seen = rng.normal(size=(5, 3, 8)).astype(np.float32)
  loss = jax.jit(
    jax.grad(lambda x: jnp.sum(module.apply({'params': params}, x) * seen))
  )
  wanted = np.einsum('bnh,inh->bi', seen, whole).reshape(x.shape)
  np.testing.assert_allclose(loss(x), wanted, rtol=1e-4, atol=1e-5)
  # No values are kept from the forward pass.
  saved = jax.eval_shape(
    lambda x: jax.vjp(lambda x: module.apply({'params': params}, x), x)[1], x
  )
  kept = [leaf for leaf in jax.tree.leaves(saved) if leaf.size >= 32 * 3 * 8]
  assert not kept
