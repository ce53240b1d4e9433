"""config.json, ours and theirs."""

import json

import golden
import pytest

from qwenvl_jax.conversion.families.qwen_vl.config import (
  config_from_hf,
  config_to_hf,
)
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
