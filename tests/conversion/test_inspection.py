"""What `inspect` says of every kind of folder."""

import json
import shutil
from pathlib import Path

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax.conversion import checkpoint_io, convert
from qwenvl_jax.conversion.inspection import inspect
from qwenvl_jax.conversion.tensors import Tensor
from qwenvl_jax.errors import CheckpointError

GOLDENS = golden.FOLDER.parent


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
  """But for the biases that Int4 adds, which are checked."""
  load = Tensor.load

  def guarded(self):
    assert len(self.shape) == 1, 'inspect loads tensors'
    return load(self)

  monkeypatch.setattr(Tensor, 'load', guarded)
  monkeypatch.setattr(checkpoint_io, 'read_params', None)


def test_released():
  report = inspect(golden.FOLDER)
  assert report.family == 'Qwen-VL'
  assert not report.problems
  rows = {part.name: part for part in report.parts}
  assert [*rows] == ['vision encoder', 'VL adapter', 'LLM', 'total']
  assert rows['total'].parameters == 2_154_672
  assert rows['total'].tensors == 61
  assert rows['LLM'].parameters + rows['VL adapter'].parameters == 1_815_808
  assert rows['total'].bytes == 4_309_344
  assert rows['total'].dtypes == ('bfloat16',)
  assert any('2 layers, width 96' in line for line in report.sizes)


def test_chat_and_files(tmp_path):
  shutil.copytree(golden.FOLDER, tmp_path, dirs_exist_ok=True)
  settings = {'chat_format': 'chatml'}
  (tmp_path / 'generation_config.json').write_text(json.dumps(settings))
  report = inspect(tmp_path)
  assert report.family == 'Qwen-VL-Chat'
  assert report.extras == ('generation_config.json',)


def test_ours_and_a_training_run(tmp_path):
  ours = tmp_path / 'ours'
  convert.from_hf(golden.FOLDER, ours)
  report = inspect(ours)
  assert (report.layout, report.problems) == ('Orbax', ())
  assert report.parts[-1].parameters == 2_154_672
  run = tmp_path / 'run'
  shutil.copytree(ours / 'params', run / 'checkpoints' / '30' / 'params')
  shutil.copy(ours / 'config.json', run)
  assert inspect(run).layout == 'Orbax, training run at step 30'
  assert inspect(run).parts[-1].parameters == 2_154_672


def test_openclip():
  report = inspect(GOLDENS / 'openclip')
  assert report.family == 'OpenCLIP vision transformer'
  assert not report.problems
  assert report.parts[-1].tensors == 28
  assert 'text tower' in report.notes[0]


def test_int4():
  report = inspect(GOLDENS / 'int4')
  assert 'int4' in report.layout
  assert not report.problems
  assert report.notes[0].startswith('87 tensors as stored')
  # What the packed weights stand for.
  (decoder,) = (part for part in report.parts if part.name == 'LLM')
  assert (
    decoder.parameters
    == 2 * (256 * 768 + 768 + 256 * 256 + 3 * 256 * 384 + 2 * 256)
    + 256
    + 2 * 512 * 256
  )


def test_a_decoder_alone_and_what_is_wrong(tmp_path):
  tensors = load_file(golden.FOLDER / 'model.safetensors')
  tensors = {n: x for n, x in tensors.items() if 'visual' not in n}
  del tensors['lm_head.weight']
  tensors['transformer.h.7.ln_1.weight'] = np.ones(256, np.float32)
  save_file(tensors, tmp_path / 'model.safetensors')
  shutil.copy(golden.FOLDER / 'config.json', tmp_path)
  report = inspect(tmp_path)
  assert [part.name for part in report.parts] == ['LLM', 'total']
  assert report.parts[0].dtypes == ('bfloat16', 'float32')
  assert '1 missing: lm_head.weight' in report.problems[0]
  assert '1 unknown: transformer.h.7.ln_1.weight' in report.problems[0]


def test_no_checkpoint_at_all(tmp_path):
  with pytest.raises(CheckpointError, match='config.json does not exist'):
    inspect(tmp_path)
  with pytest.raises(CheckpointError, match='does not exist: expected a check'):
    inspect(Path(tmp_path, 'nothing'))
