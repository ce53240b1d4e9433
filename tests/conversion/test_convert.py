"""Whole folders: there and back, stage 1's start, and the command."""

import json
import shutil
from pathlib import Path

import golden
import jax
import numpy as np
import pytest

from qwenvl_jax.conversion import cli, convert, layout, openclip
from qwenvl_jax.conversion import folder as folders
from qwenvl_jax.conversion.hf_config import config_from_hf, config_to_hf
from qwenvl_jax.conversion.reader import open_released, read_json
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import AdapterConfig, VisionConfig, qwen_vl_7b
from qwenvl_jax.model.vision import VisionTransformer

OPENCLIP = Path(__file__).parents[1] / 'goldens' / 'openclip'


def test_there_and_back_is_bit_exact(tmp_path):
  convert.from_hf(golden.FOLDER, tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back', shard_bytes=1_000_000)
  first, second = open_released(golden.FOLDER), open_released(tmp_path / 'back')
  assert first.keys() == second.keys()
  for name, tensor in first.items():
    assert tensor.dtype == second[name].dtype
    assert tensor.load().tobytes() == second[name].load().tobytes(), name
  assert folders.read_config(tmp_path / 'back') == folders.read_config(
    golden.FOLDER
  )


def test_config_of_the_release_round_trips():
  for config in (
    qwen_vl_7b(),
    qwen_vl_7b(
      vision=VisionConfig(window=8, width=48, heads=3, mlp_dim=113),
      adapter=AdapterConfig(queries=64),
    ),
  ):
    assert config_from_hf(config_to_hf(config)) == config
  released = config_to_hf(qwen_vl_7b())
  assert released['visual']['mlp_ratio'] == 4.9231
  assert released['intermediate_size'] == 22016
  assert 'queries' not in released['visual']


def test_another_model_family():
  with pytest.raises(CheckpointError, match="model_type is 'llama'"):
    config_from_hf({'model_type': 'llama'}, 'x/config.json')
  raw = json.loads((golden.FOLDER / 'config.json').read_text())
  del raw['kv_channels']
  with pytest.raises(CheckpointError, match="key 'kv_channels' is missing"):
    config_from_hf(raw, 'x/config.json')


def test_openclip_vision_matches_the_released_implementation():
  raw = read_json(OPENCLIP / 'open_clip_config.json')
  vision = openclip.vision_config(raw, 'golden')
  config = golden.config().replace(vision=vision)
  params = openclip.read_vision(OPENCLIP, config)
  with np.load(OPENCLIP / 'expected.npz') as arrays:
    expected = dict(arrays)
  # OpenCLIP's own epsilon, which Qwen-VL does not take over.
  model = VisionTransformer(
    VisionConfig(**{**vision.__dict__, 'norm_eps': openclip.OPENCLIP_EPS})
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


def test_init_stage1(tmp_path):
  out = tmp_path / 'start'
  convert.init_stage1(OPENCLIP, golden.FOLDER, out, seed=3)
  config = folders.read_config(out)
  params = folders.read_params(out, config)
  folders.check_against(config, params, 'start')
  vision = openclip.read_vision(OPENCLIP, config)['vision']
  for path, value in layout.flatten(vision):
    stored = dict(layout.flatten(params['vision']))[path]
    np.testing.assert_array_equal(stored, value)
  decoder = golden.params()['decoder']['embed']
  np.testing.assert_array_equal(
    np.asarray(params['decoder']['embed'], np.float32), decoder
  )
  again = tmp_path / 'again'
  convert.init_stage1(OPENCLIP, golden.FOLDER, again, seed=3)
  same = jax.tree.map(
    lambda a, b: np.array_equal(a, b),
    params['adapter'],
    folders.read_params(again, config)['adapter'],
  )
  assert all(jax.tree.leaves(same))


def test_destination_in_use_is_left_alone(tmp_path):
  target = tmp_path / 'mine'
  target.mkdir()
  (target / 'thesis.txt').write_text('years of work')
  with pytest.raises(CheckpointError, match='is not empty'):
    convert.from_hf(golden.FOLDER, target)
  assert (target / 'thesis.txt').read_text() == 'years of work'


def test_interrupted_conversion_starts_again(tmp_path):
  partial = tmp_path / 'ours.partial'
  (partial / 'params').mkdir(parents=True)
  convert.from_hf(golden.FOLDER, tmp_path / 'ours')
  assert not partial.exists()
  config = folders.read_config(tmp_path / 'ours')
  folders.check_against(
    config, folders.read_params(tmp_path / 'ours', config), 'ours'
  )


def test_float16_that_overflows(tmp_path):
  source = tmp_path / 'source'
  convert.from_hf(golden.FOLDER, source, dtype='float32')
  config = folders.read_config(source)
  params = folders.read_params(source, config)
  params['decoder']['ln_f']['scale'] *= 1e6
  shutil.rmtree(source / 'params')
  folders.write_params(source, params)
  with pytest.raises(CheckpointError, match='ln_f.weight has values beyond'):
    convert.to_hf(source, tmp_path / 'half', dtype='float16')
  assert not (tmp_path / 'half').exists()


def test_damaged_orbax_parameters(tmp_path):
  convert.from_hf(golden.FOLDER, tmp_path / 'ours')
  for path in (tmp_path / 'ours' / 'params').rglob('d/*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  config = folders.read_config(tmp_path / 'ours')
  with pytest.raises(CheckpointError, match='ours/params cannot be'):
    folders.read_params(tmp_path / 'ours', config)


def test_command(tmp_path, capsys):
  assert not cli.main(['from-hf', str(golden.FOLDER), str(tmp_path / 'ours')])
  assert not cli.main(['inspect', str(tmp_path / 'ours')])
  out = capsys.readouterr().out
  assert '2,154,672' in out
  assert 'every tensor' in out
  assert cli.main(['inspect', str(tmp_path / 'nothing')]) == 2
  assert 'does not exist' in capsys.readouterr().err
