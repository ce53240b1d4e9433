"""config.json, ours and theirs."""

import json

import golden
import pytest

from qwenvl_jax.conversion.families.qwen_vl.config import (
  config_from_hf,
  config_to_hf,
)
from qwenvl_jax.conversion.json_schema import read_json
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import AdapterConfig, VisionConfig, qwen_vl_7b


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
  with pytest.raises(CheckpointError, match=r"'llama'.* looks like Llama"):
    config_from_hf({'model_type': 'llama'}, 'x/config.json')
  raw = json.loads((golden.FOLDER / 'config.json').read_text())
  del raw['kv_channels']
  with pytest.raises(CheckpointError, match="key 'kv_channels' is missing"):
    config_from_hf(raw, 'x/config.json')


def golden_config() -> dict:
  return json.loads((golden.FOLDER / 'config.json').read_text())


def change(raw: dict, path: str, value) -> dict:
  *parents, last = path.split('/')
  node = raw
  for key in parents:
    node = node[key]
  node[last] = value
  return raw


@pytest.mark.parametrize(
  ('path', 'value', 'told'),
  [
    ('num_hidden_layers', 10**9, r'1000000000, not a whole .* 1 to 4,096'),
    ('num_hidden_layers', '2', "'2', not a whole number"),
    ('num_hidden_layers', None, 'None, not a whole number'),
    ('num_hidden_layers', 2.0, '2.0, not a whole number'),
    ('num_hidden_layers', True, 'True, not a whole number'),
    ('hidden_size', [256], r'\[256\], not a whole number'),
    ('vocab_size', 0, '0, not a whole number from 1'),
    ('intermediate_size', 10**400, 'not a whole number'),
    ('num_attention_heads', -4, '-4, not a whole number'),
    ('layer_norm_epsilon', float('nan'), 'nan, not a number from 0 to 1'),
    ('layer_norm_epsilon', '1e-6', "'1e-6', not a number"),
    ('rotary_emb_base', float('inf'), 'inf, not a number'),
    ('use_logn_attn', 'yes', "'yes', not true or false"),
    ('use_dynamic_ntk', 1, '1, not true or false'),
    ('visual', [1], r'\[1\], not an object'),
    ('visual/mlp_ratio', {}, r'visual: mlp_ratio is \{\}, not a number'),
    ('visual/queries', 2.5, 'visual: queries is 2.5, not a whole number'),
    ('visual/heads', 5, 'is not a multiple of heads=5'),
    ('visual/patch_size', 0, 'patch_size is 0, not a whole number'),
    ('visual/image_start_id', '500', "image_start_id is '500', not"),
    ('quantization_config', 'gptq', "'gptq', not an object"),
    ('quantization_config', {'bits': 8}, 'bits is 8, not 4'),
    ('quantization_config', {'bits': 4}, "'group_size' is missing"),
    ('model_type', ['qwen'], 'model_type is .* a family that is not known'),
    ('model_type', 10**400, 'model_type is '),
  ],
)
def test_odd_types_and_sizes(path, value, told):
  raw = change(golden_config(), path, value)
  with pytest.raises(CheckpointError, match=told) as error:
    config_from_hf(raw, 'x/config.json')
  assert str(error.value).startswith('x/config.json: ')
  assert len(str(error.value)) < 400


@pytest.mark.parametrize(
  ('text', 'told'),
  [
    ('{"model_type": ' * 100_000, 'nested too deep'),
    ('[' * 100_000, 'nested too deep'),
    ('{"a": 1, "a": 2}', 'key a stands in it twice'),
    ('[1]', 'does not hold a JSON object'),
    ('{"a": ' + '1' * 5000 + '}', 'is not valid JSON'),
    ('\udcff', 'is not valid JSON'),
    (' ' * (2**24 + 1), 'more than 16,777,216 bytes'),
  ],
)
def test_json_that_is_none(tmp_path, text, told):
  path = tmp_path / 'config.json'
  path.write_bytes(text.encode('utf-8', 'surrogateescape'))
  with pytest.raises(CheckpointError, match=told):
    read_json(path)
