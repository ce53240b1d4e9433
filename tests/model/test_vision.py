"""Vision transformer and adapter: resolutions, windows, position tables."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.model.adapter import Adapter
from qwenvl_jax.model.config import AdapterConfig, VisionConfig
from qwenvl_jax.model.positions import resize_positions, sincos_positions
from qwenvl_jax.model.vision import (
  CLIP_MEAN,
  CLIP_STD,
  VisionTransformer,
  normalize_pixels,
  windowed,
)


@functools.cache
def _encode(resolution):
  """Features and activations of both golden images at a resolution."""
  from PIL import Image

  images = [
    Image.open(golden.FOLDER / name)
    .convert('RGB')
    .resize((resolution, resolution), Image.Resampling.BICUBIC)
    for name in ('wide.png', 'tall.png')
  ]
  pixels = np.stack([np.asarray(image) for image in images])
  features, state = golden.model().apply(
    {'params': golden.params()},
    pixels,
    method='encode_images',
    mutable='intermediates',
  )
  found = state['intermediates']
  return {
    'pixels': np.asarray(normalize_pixels(pixels)),
    'features': features,
    'after_blocks': found['after_blocks'][0],
    'after_ln_pre': found['vision']['after_ln_pre'][0],
    'after_adapter': found['adapter']['after_adapter'][0],
  }


def test_preprocessing_matches_the_release():
  pixels = _encode(112)['pixels']
  for image, name in zip(pixels, ('wide.png', 'tall.png'), strict=True):
    assert np.abs(image - golden.pixels(name)).max() < 1e-5


@pytest.mark.parametrize(
  'name', ['after_ln_pre', 'after_blocks', 'after_adapter', 'features']
)
def test_every_stage_at_the_trained_resolution(name):
  wanted = golden.expected()[f'vision/112/{name}']
  assert np.abs(_encode(112)[name] - wanted).max() < golden.ATOL


@pytest.mark.parametrize('resolution', [224, 448])
def test_other_resolutions(resolution):
  e, found = golden.expected(), _encode(resolution)
  blocks = found['after_blocks'][:1, ::16]
  wanted = e[f'vision/{resolution}/after_blocks_every16']
  assert np.abs(blocks - wanted).max() < golden.ATOL
  features = found['features'][:1, ::4]
  wanted = e[f'vision/{resolution}/features_every4']
  assert np.abs(features - wanted).max() < golden.ATOL


def test_resolution_that_is_no_multiple_of_the_patch():
  with pytest.raises(DataError, match='multiple of 14'):
    golden.model().apply(
      {'params': golden.params()},
      np.zeros((1, 100, 100, 3), np.uint8),
      method='encode_images',
    )


def test_normalize_pixels():
  """uint8 is normalized, float is taken as it is."""
  pixels = np.array([[0, 128, 255]], np.uint8)
  wanted = (np.array([[0, 128, 255]]) / 255 - CLIP_MEAN) / CLIP_STD
  np.testing.assert_allclose(normalize_pixels(pixels), wanted, rtol=1e-5)
  assert normalize_pixels(wanted) is wanted


def test_resize_keeps_a_constant_and_a_fitting_table():
  table = jnp.ones((256, 3))
  assert resize_positions(table, (16, 16)) is table
  for grid in ((32, 32), (8, 8), (20, 12)):
    resized = resize_positions(table, grid)
    assert resized.shape == (grid[0] * grid[1], 3)
    np.testing.assert_allclose(resized, 1, atol=1e-5)


def test_windows_see_their_own_patches_only():
  """Averaging within windows of 2x2 equals averaging blocks of the grid."""
  grid = np.arange(24.0).reshape(4, 6)
  x = jnp.asarray(grid.reshape(1, 24, 1, 1))

  def mean(x):
    return jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)

  out = windowed(mean, x, grid=(4, 6), window=2)
  blocks = grid.reshape(2, 2, 3, 2).mean((1, 3))
  wanted = np.repeat(np.repeat(blocks, 2, 0), 2, 1)
  np.testing.assert_allclose(np.asarray(out).reshape(4, 6), wanted)


def test_window_attention_in_three_of_four_blocks():
  """With windows alone a far patch has no influence; a global block has."""
  config = VisionConfig(
    image_size=56, width=32, layers=4, heads=2, mlp_dim=32, window=2
  )
  pixels = np.random.default_rng(0).random((1, 56, 56, 3), np.float32)
  model = VisionTransformer(config)
  params = jax.jit(model.init)(jax.random.key(0), pixels)

  def influence(config):
    """On the first patch, of the last one."""

    def first(pixels):
      return VisionTransformer(config).apply(params, pixels)[0, 0].sum()

    return np.abs(jax.grad(first)(jnp.asarray(pixels))[0, 42:, 42:]).max()

  never = dataclasses.replace(config, global_every=5)
  assert influence(never) == 0
  assert influence(config) > 0
  with pytest.raises(DataError, match='windows of 3x3'):
    influence(dataclasses.replace(config, window=3))


@pytest.mark.parametrize('queries', [64, 144, 256, 400])
def test_numbers_of_queries(queries):
  adapter = Adapter(AdapterConfig(queries=queries, dim=32, heads=1))
  x = jnp.zeros((2, 64, 16))
  params = jax.jit(adapter.init, static_argnums=2)(jax.random.key(0), x, (8, 8))
  assert adapter.apply(params, x, (8, 8)).shape == (2, queries, 32)


def test_number_of_queries_must_be_square():
  with pytest.raises(ConfigError, match='queries=100 is not|queries=200'):
    AdapterConfig(queries=200)


def test_aligned_queries_attend_to_their_own_place():
  """Feature i answers a change at patch i far more than one elsewhere."""
  adapter = Adapter(AdapterConfig(queries=64, dim=128, heads=1, init='aligned'))
  x = jax.random.normal(jax.random.key(1), (1, 64, 48))
  params = jax.jit(adapter.init, static_argnums=2)(jax.random.key(0), x, (8, 8))
  jacobian = jax.jacobian(lambda x: adapter.apply(params, x, (8, 8))[0, :, :4])(
    x
  )
  influence = np.abs(jacobian[:, :, 0]).sum((1, 3))
  assert (influence.argmax(1) == np.arange(64)).mean() > 0.75


def test_position_table_of_the_release():
  """Same construction as the stored one, which was rounded to bf16."""
  stored = golden.params()['adapter']['pos_embed']
  assert np.abs(sincos_positions(16, 256) - stored).max() < 4e-3
