"""Vision transformer and adapter: resolutions, windows, position tables."""

import dataclasses
import functools
import math

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.model.adapter import Adapter
from qwenvl_jax.model.config import AdapterConfig, VisionConfig
from qwenvl_jax.model.lora import LoraConfig
from qwenvl_jax.model.positions import resize_positions, sincos_positions
from qwenvl_jax.model.vision import (
  CLIP_MEAN,
  CLIP_STD,
  VisionTransformer,
  normalize_pixels,
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


def _by_loops(params, config, pixels):
  """Features of one image, a window and a head after the other in NumPy."""

  def norm(x, p):
    scale = np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
    return (x - x.mean(-1, keepdims=True)) / scale * p['scale'] + p['bias']

  def project(x, p, axes):
    return np.tensordot(x, p['kernel'], axes) + p['bias']

  def attend(x, p):
    q, k, v = (project(x, p[name], 1) for name in 'qkv')
    out = np.empty_like(q)
    for head in range(config.heads):
      scores = q[:, head] @ k[:, head].T / config.head_dim**0.5
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out[:, head] = weights @ v[:, head]
    return project(out, p['out'], 2)

  params = jax.tree.map(np.float64, params)
  rows, columns = (side // config.patch_size for side in pixels.shape[:2])
  patches = pixels.reshape(rows, config.patch_size, columns, -1, 3)
  patches = patches.swapaxes(1, 2).reshape(rows * columns, -1)
  x = patches @ params['patch_embed']['kernel'].reshape(-1, config.width)
  x = norm(x + params['pos_embed'], params['ln_pre'])
  for layer in range(config.layers):
    p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['blocks'])
    side = config.window
    if layer % config.global_every == config.global_every - 1:
      side = rows
    y, places = norm(x, p['ln_1']), np.arange(rows * columns)
    places = places.reshape(rows, columns)
    for top in range(0, rows, side):
      for left in range(0, columns, side):
        seen = places[top : top + side, left : left + side].ravel()
        x[seen] += attend(y[seen], p['attn'])
    y = project(norm(x, p['ln_2']), p['mlp']['up'], 1)
    y = y * (1 + np.vectorize(math.erf)(y / 2**0.5)) / 2
    x = x + project(y, p['mlp']['down'], 1)
  return x


# Every other block, and one that is left over.
_WINDOWS = VisionConfig(
  image_size=56,
  width=32,
  layers=3,
  heads=2,
  mlp_dim=32,
  position_grid=4,
  window=2,
  global_every=2,
)


@functools.cache
def _windows():
  """(parameters that are nowhere zero, pixels)"""
  rng = np.random.default_rng(0)
  pixels = rng.random((1, 56, 56, 3), np.float32)
  params = jax.jit(VisionTransformer(_WINDOWS).init)(jax.random.key(0), pixels)[
    'params'
  ]
  params = jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32),
    nn.meta.unbox(params),
  )
  return params, pixels


def test_window_attention_is_that_of_each_window():
  params, pixels = _windows()
  apply = jax.jit(VisionTransformer(_WINDOWS).apply)
  found = apply({'params': params}, pixels)[0]
  wanted = _by_loops(params, _WINDOWS, pixels[0])
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  everywhere = dataclasses.replace(_WINDOWS, window=4)
  assert np.abs(_by_loops(params, everywhere, pixels[0]) - wanted).max() > 0.01


def test_gradients_of_windows():
  """One window that is the whole grid is global attention, backward as well.

  Whatever the backward pass computes again.
  """
  params, pixels = _windows()

  def gradient(window, remat):
    config = dataclasses.replace(_WINDOWS, window=window)

    def loss(params):
      model = VisionTransformer(config, remat=remat)
      return (model.apply({'params': params}, pixels) ** 2).mean()

    return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

  pairs = zip(gradient(4, 'full'), gradient(None, 'none'), strict=True)
  for found, wanted in pairs:
    np.testing.assert_allclose(found, wanted, atol=1e-5)


class _Tower(nn.Module):
  """A vision transformer under its name in Qwen-VL."""

  config: VisionConfig
  lora: LoraConfig

  @nn.compact
  def __call__(self, pixels):
    return VisionTransformer(self.config, lora=self.lora, name='vision')(pixels)


def test_windows_are_adapted_like_global_attention():
  """By low-rank factors, whose dropout follows from the key."""
  lora = LoraConfig(rank=2, targets='vision/blocks/.*', dropout=0.5)
  pixels = _windows()[1]
  params = nn.meta.unbox(
    jax.jit(_Tower(_WINDOWS, lora).init)(jax.random.key(0), pixels)
  )
  params = jax.tree.map(lambda x: x + 0.1, params)

  def encode(window, **how):
    config = dataclasses.replace(_WINDOWS, window=window)
    return jax.jit(_Tower(config, lora).apply)(params, pixels, **how)

  # A window that is the whole grid.
  np.testing.assert_allclose(encode(4), encode(None), atol=1e-4)
  found = [
    encode(2, rngs={'dropout': jax.random.key(seed)}) for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(found[0], found[1])
  for other in (found[2], encode(2)):
    assert np.abs(found[0] - other).max() > 1e-4


def test_backward_pass_of_windows_keeps_no_scores_of_all_patches():
  """At 896 pixels one global block keeps 4096 x 4096 scores, not all four."""
  config = VisionConfig(
    image_size=896, width=8, layers=4, heads=1, mlp_dim=8, window=16
  )
  pixels = jnp.zeros((1, 896, 896, 3), jnp.uint8)

  def memory(config):
    model = VisionTransformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0), pixels)
    step = jax.jit(jax.grad(lambda p: model.apply(p, pixels).sum()))
    return step.lower(params).compile().memory_analysis().temp_size_in_bytes

  assert memory(config) < memory(dataclasses.replace(config, window=None)) / 2


def test_windows_do_not_change_what_is_stored():
  def shapes(config):
    pixels = jax.ShapeDtypeStruct((1, 448, 448, 3), jnp.uint8)
    model = VisionTransformer(config)
    return jax.eval_shape(model.init, jax.random.key(0), pixels)

  assert shapes(VisionConfig(window=16)) == shapes(VisionConfig())


def test_windows_on_a_mesh_equal_those_on_one_device(run_on_devices):
  run_on_devices(4, _ON_A_MESH)


_ON_A_MESH = """
import flax.linen as nn
import jax
import numpy as np
from qwenvl_jax import sharding
from qwenvl_jax.model.config import VisionConfig
from qwenvl_jax.model.vision import VisionTransformer

config = VisionConfig(56, width=16, layers=2, heads=2, mlp_dim=32,
                      window=2, global_every=2)
model = VisionTransformer(config)
pixels = np.random.default_rng(0).random((4, 56, 56, 3), np.float32)
boxed = jax.jit(model.init)(jax.random.key(0), pixels)
params = nn.meta.unbox(boxed)
wanted = jax.jit(model.apply)(params, pixels)
mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2))
with sharding.use_mesh(mesh):
  split = jax.device_put(params, sharding.param_shardings(boxed, mesh))
  found = jax.jit(model.apply)(split, pixels)
kernel = split['params']['blocks']['attn']['q']['kernel']
assert not kernel.sharding.is_fully_replicated
np.testing.assert_allclose(found, wanted, atol=1e-5)
"""


def test_windows_that_do_not_fit():
  with pytest.raises(ConfigError, match='window=3 does not divide'):
    dataclasses.replace(_WINDOWS, window=3)
  with pytest.raises(ConfigError, match='window=0 does not divide'):
    dataclasses.replace(_WINDOWS, window=0)
  params, _ = _windows()
  with pytest.raises(DataError, match='windows of 2x2'):
    VisionTransformer(_WINDOWS).apply(
      {'params': params}, np.zeros((1, 42, 56, 3), np.uint8)
    )


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
