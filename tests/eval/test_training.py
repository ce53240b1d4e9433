"""Tasks are scored with the parameters that training has."""

import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.training import DuringTraining, on_one_device
from qwenvl_jax.model.stacking import stack_layers


def test_scores_are_those_of_a_run(
  random_handle, make_model, varied, tmp_path, monkeypatch
):
  monkeypatch.setattr(registry, 'get', lambda name: varied)
  random_handle.tokenizer.save(tmp_path / 'qwen.tiktoken')
  evaluation = DuringTraining(
    ['varied'], str(tmp_path), limit=6, slots=32, max_len=192
  )
  # As training has them: layers stacked.
  config = random_handle.config.replace(scan_layers=True)
  found = evaluation(config, stack_layers(random_handle.params), tmp_path)
  examples = list(varied.examples(None))[:6]
  right = [
    len(said.text.strip()) % 2 == 0
    for _, said in make_model(1).answer(examples, varied.decoding)
  ]
  assert found == {'varied/accuracy': pytest.approx(sum(right) / 6)}


def test_what_training_keeps_otherwise_stays():
  words = np.array([0x12345678, -1], np.int32)
  params = {'words': words, 'scales': np.ones(2, np.float32)}
  table = np.array([1 + 2**-20], np.float32)
  adapter = {'pos_embed': table, 'kernel': table}
  found = on_one_device(params | {'adapter': adapter}, 'bfloat16')
  np.testing.assert_array_equal(found['adapter']['pos_embed'], table)
  assert found['adapter']['kernel'].dtype == 'bfloat16'
  np.testing.assert_array_equal(found['words'], words)
  assert found['words'].dtype == np.int32
  assert found['scales'].dtype == 'bfloat16'


def test_what_it_needs_is_asked_for():
  with pytest.raises(ConfigError, match='tasks is empty'):
    DuringTraining()
  with pytest.raises(ConfigError, match='DuringTraining.every=0'):
    DuringTraining(['a'], every=0)
