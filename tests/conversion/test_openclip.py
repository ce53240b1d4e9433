"""OpenCLIP's vision transformer as ours."""

from pathlib import Path

import golden
import numpy as np
import pytest

from qwenvl_jax.conversion import checkpoint_io
from qwenvl_jax.conversion.families import openclip
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import VisionConfig
from qwenvl_jax.model.vision import VisionTransformer

OPENCLIP = Path(__file__).parents[1] / 'goldens' / 'openclip'


def test_matches_the_released_implementation():
  vision = openclip.read_config(OPENCLIP)
  config = golden.config().replace(vision=vision)
  params = checkpoint_io.read_params(OPENCLIP, config, 'float32')
  assert params.keys() == {'vision'}
  with np.load(OPENCLIP / 'expected.npz') as arrays:
    expected = dict(arrays)
  # OpenCLIP's own epsilon, which Qwen-VL does not take over.
  model = VisionTransformer(
    # OpenCLIP computes its norms with this epsilon, Qwen-VL with 1e-6.
    VisionConfig(**{**vision.__dict__, 'norm_eps': 1e-5})
  )
  out, state = model.apply(
    {'params': params['vision']},
    expected['pixels'].transpose(0, 2, 3, 1),
    mutable='intermediates',
  )
  first = state['intermediates']['after_ln_pre'][0]
  assert np.abs(first - expected['after_ln_pre']).max() < golden.ATOL
  assert np.abs(out - expected['after_blocks']).max() < golden.ATOL
  assert vision.norm_eps == 1e-6


def test_config_of_something_else():
  with pytest.raises(CheckpointError, match="key 'patch_size' is missing"):
    openclip.vision_config(
      {'model_cfg': {'vision_cfg': {'width': 64, 'layers': [1, 2]}}}, 'resnet'
    )


def test_folder_without_weights(tmp_path):
  with pytest.raises(CheckpointError, match='holds no OpenCLIP weights'):
    openclip.open_vision(tmp_path, VisionConfig())
