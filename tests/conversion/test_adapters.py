"""Adapters of PEFT and of ours on the golden model."""

import dataclasses
import functools
import json
import shutil

import golden
import lora_golden
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qwenvl_jax.conversion import adapters, checkpoint_io, cli, layout, low_rank
from qwenvl_jax.conversion.base_digest import digest
from qwenvl_jax.conversion.convert import from_hf, to_hf
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.lora import LoraConfig


def saved(name):
  path = lora_golden.FOLDER / name / 'adapter_model.safetensors'
  return safetensors.numpy.load_file(path)


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  """Name to PEFT's adapter as one of ours."""
  folder = tmp_path_factory.mktemp('ours')
  for name in lora_golden.NAMES:
    source = lora_golden.FOLDER / name
    adapters.from_peft(source, golden.FOLDER, folder / name)
  return {name: folder / name for name in lora_golden.NAMES}


@pytest.mark.parametrize('name', lora_golden.NAMES)
def test_to_ours_and_back_to_peft_changes_nothing(name, ours, tmp_path):
  adapters.to_peft(ours[name], tmp_path / 'peft')
  found = safetensors.numpy.load_file(
    tmp_path / 'peft' / 'adapter_model.safetensors'
  )
  wanted = saved(name)
  assert found.keys() == wanted.keys()
  for key, array in wanted.items():
    np.testing.assert_array_equal(found[key], array, err_msg=key)
  made = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
  settings = lora_golden.read(name, 'adapter_config.json')
  for key in ('r', 'lora_alpha', 'lora_dropout', 'peft_type', 'task_type'):
    assert made[key] == settings[key], key
  # PEFT adapts every layer whose name ends so.
  layers = {k.split('.lora_')[0] for k in wanted if '.lora_' in k}
  for tensor in layers:
    assert any(tensor.endswith(f'.{x}') for x in made['target_modules'])
  assert made['modules_to_save'] == settings['modules_to_save']


@pytest.mark.parametrize('name', lora_golden.NAMES)
def test_merged_as_peft_merges(name, ours, tmp_path):
  adapters.merge(golden.FOLDER, ours[name], tmp_path / 'merged')
  to_hf(tmp_path / 'merged', tmp_path / 'released')
  found = open_released(tmp_path / 'released')
  compared = 0
  for key, wanted in lora_golden.expected().items():
    if not key.startswith(f'{name}/merged/'):
      continue
    compared += 1
    rows = found[key.split('/')[-1]].load()[::8]
    np.testing.assert_array_equal(
      rows.astype(np.float32),
      wanted.astype(ml_dtypes.bfloat16).astype(np.float32),
      err_msg=key,
    )
  assert compared == {'chat': 3, 'base': 4}[name]


def test_a_base_is_known_by_its_values(tmp_path):

  from_hf(golden.FOLDER, tmp_path / 'converted')
  assert digest(tmp_path / 'converted') == digest(golden.FOLDER)


def test_an_adapter_for_another_base_is_refused(ours, tmp_path):
  changed = dict(layout.flatten(golden.params()))
  changed['decoder/ln_f/scale'] = changed['decoder/ln_f/scale'] * 2
  golden.save_params(tmp_path, layout.unflatten(changed))
  assets.write_assets(tmp_path, golden.config())
  with pytest.raises(CheckpointError, match='has other values'):
    adapters.open_adapter(ours['chat'], tmp_path, golden.config())


def test_an_adapter_of_other_sizes_is_refused(ours):
  decoder = dataclasses.replace(golden.config().decoder, mlp_dim=96)
  config = golden.config().replace(decoder=decoder)
  for folder in (ours['chat'], lora_golden.FOLDER / 'chat'):
    with pytest.raises(CheckpointError, match='352'):
      adapters.open_adapter(folder, golden.FOLDER, config)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'use_dora': True}, 'use_dora=True is not supported'),
    ({'rank_pattern': {'c_attn': 4}}, 'rank_pattern'),
    ({'alpha_pattern': {'c_attn': 4}}, 'alpha_pattern'),
    ({'bias': 'all'}, "bias='all'"),
    ({'peft_type': 'IA3'}, 'IA3'),
    ({'init_lora_weights': 'pissa'}, 'pissa'),
    ({'r': 4}, r'of rank 8, but adapter_config.json says r=4'),
    ({'modules_to_save': ['wte']}, 'lacks wte'),
  ],
)
def test_what_is_not_supported_is_named(change, message, tmp_path):
  shutil.copytree(lora_golden.FOLDER / 'chat', tmp_path / 'peft')
  path = tmp_path / 'peft' / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(CheckpointError, match=message):
    adapters.open_adapter(tmp_path / 'peft', golden.FOLDER, golden.config())


def test_an_adapter_of_rslora_is_scaled_so(tmp_path):
  shutil.copytree(lora_golden.FOLDER / 'chat', tmp_path / 'peft')
  path = tmp_path / 'peft' / 'adapter_config.json'
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {'use_rslora': True})
  )
  found = adapters.open_adapter(
    tmp_path / 'peft', golden.FOLDER, golden.config()
  )
  assert found.lora.scale == 16 / 8**0.5


def test_commands(tmp_path, capsys):
  base, chat = str(golden.FOLDER), str(lora_golden.FOLDER / 'chat')
  ours, peft, merged = (str(tmp_path / x) for x in ('ours', 'peft', 'merged'))
  assert not cli.main(['adapter-from-peft', chat, base, ours])
  assert 'rank 8, decoder/blocks/attn/qkv' in capsys.readouterr().out
  assert not cli.main(['adapter-to-peft', ours, peft, '--base', 'Qwen/X'])
  settings = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
  assert settings['base_model_name_or_path'] == 'Qwen/X'
  assert not cli.main(['merge-adapter', base, peft, merged])
  assert cli.main(['merge-adapter', base, base, str(tmp_path / 'none')]) == 2
  assert 'is no adapter' in capsys.readouterr().err


def test_merged_into_packed_kernels(tmp_path):
  """Q-LoRA's factors on the dequantized values, however these are stored."""
  int4 = golden.FOLDER.parent / 'int4'
  config = checkpoint_io.read_config(int4)
  config = config.replace(lora=LoraConfig(rank=2, alpha=4))
  rng = np.random.default_rng(0)
  values = {
    path: rng.normal(0, 0.1, shape).astype(np.float32)
    for path, shape in low_rank.factor_shapes(config).items()
  }
  adapter = low_rank.LowRank(
    config.lora, adapters.base_of(int4), values, 'factors'
  )
  (tmp_path / 'adapter').mkdir()
  low_rank.write_ours(tmp_path / 'adapter', adapter)
  from_hf(int4, tmp_path / 'kept', keep_int4=True)
  found = []
  for base in (int4, tmp_path / 'kept'):
    merged = tmp_path / f'merged-{base.name}'
    adapters.merge(base, tmp_path / 'adapter', merged, 'float32')
    made = checkpoint_io.read_config(merged)
    found.append(checkpoint_io.read_params(merged, made))
  plain = checkpoint_io.read_params(int4, config, 'float32')
  path = ('decoder', 'blocks', 'attn', 'k', 'kernel')
  one, other, before = (
    functools.reduce(dict.__getitem__, path, tree) for tree in (*found, plain)
  )
  np.testing.assert_array_equal(one, other)
  first = values['decoder/blocks/attn/qkv/lora_a']
  second = values['decoder/blocks/attn/k/lora_b']
  np.testing.assert_allclose(
    one, before + 2 * np.einsum('ldr,lrnh->ldnh', first, second), atol=1e-5
  )
