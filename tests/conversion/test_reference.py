"""Running the code that lies in a checkpoint's folder."""

import json
import shutil

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax.conversion import reference
from qwenvl_jax.errors import CheckpointError

pytest.importorskip('torch')
pytest.importorskip('transformers')

_CONFIGURATION = """
from transformers import PretrainedConfig

class QWenConfig(PretrainedConfig):
  model_type = 'qwen'
"""

# A stand-in with two of the tensors: the release's code is not ours to copy. It
# has the release's ways: a table that is no parameter, made with the model, and
# a precision of its own choice unless it is told one.
_MODELING = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_qwen import QWenConfig

class Inner(torch.nn.Module):
  def __init__(self, config):
    super().__init__()
    self.wte = torch.nn.Embedding(config.vocab_size, config.hidden_size)
    self.table = torch.arange(1, config.vocab_size + 1).float()

class QWenLMHeadModel(PreTrainedModel):
  config_class = QWenConfig

  def __init__(self, config):
    super().__init__(config)
    self.transformer = Inner(config)
    self.lm_head = torch.nn.Linear(
      config.hidden_size, config.vocab_size, bias=False)
    if not config.fp32:
      self.bfloat16()
    self.post_init()

  def forward(self, input_ids):
    inner = self.transformer
    logits = self.lm_head(inner.wte(input_ids)) / inner.table
    return CausalLMOutput(logits=logits)
"""


@pytest.fixture
def folder(tmp_path):
  shutil.copy(golden.FOLDER / 'model.safetensors', tmp_path)
  config = json.loads((golden.FOLDER / 'config.json').read_text())
  config['auto_map'] = {
    'AutoConfig': 'configuration_qwen.QWenConfig',
    'AutoModelForCausalLM': 'modeling_qwen.QWenLMHeadModel',
  }
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'configuration_qwen.py').write_text(_CONFIGURATION)
  (tmp_path / 'modeling_qwen.py').write_text(_MODELING)
  return tmp_path


def test_logits(folder):
  tokens = np.array([[3, 400, 7]])
  logits = reference.released_logits(folder, tokens)
  tensors = load_file(folder / 'model.safetensors')
  embed = tensors['transformer.wte.weight'].astype(np.float32)
  head = tensors['lm_head.weight'].astype(np.float32)
  assert logits.dtype == np.float32
  wanted = embed[tokens] @ head.T / np.arange(1, len(head) + 1)
  np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_weights_that_the_code_lacks(folder):
  tensors = load_file(folder / 'model.safetensors')
  del tensors['lm_head.weight']
  save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(CheckpointError, match='1 missing: lm_head.weight'):
    reference.released_logits(folder, np.array([[3]]))


def test_code_that_fails(folder):
  (folder / 'modeling_qwen.py').write_text('import no_such_module_at_all\n')
  with pytest.raises(CheckpointError, match='code in .* does not run here'):
    reference.released_logits(folder, np.array([[3]]))


def test_the_picture_is_the_same_each_time():
  with reference.fixed_picture() as first, reference.fixed_picture() as second:
    assert first.read_bytes() == second.read_bytes()
  assert not first.exists()
