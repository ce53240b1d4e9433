"""Two checkpoints, compared."""

import json
import shutil

import golden
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.verify import verify


@pytest.fixture
def other(tmp_path):
  """Writes a changed copy of the golden."""

  def write(changes):
    tensors = load_file(golden.FOLDER / 'model.safetensors') | changes
    tensors = {n: x for n, x in tensors.items() if x is not None}
    folder = tmp_path / 'other'
    folder.mkdir()
    save_file(tensors, folder / 'model.safetensors')
    shutil.copy(golden.FOLDER / 'config.json', folder)
    return folder

  return write


def test_the_same_in_every_layout(tmp_path):
  convert.from_hf(golden.FOLDER, tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back', shard_bytes=1_000_000)
  for folder in (tmp_path / 'ours', tmp_path / 'back', golden.FOLDER):
    found = verify(golden.FOLDER, folder)
    assert found.same
    assert (found.tensors, found.values) == (61, 2_154_672)
    assert not found.cast


def test_one_bit(other):
  name = 'transformer.h.1.attn.c_attn.weight'
  value = load_file(golden.FOLDER / 'model.safetensors')[name].copy()
  value[500, 3] = 7.5
  before = float(load_file(golden.FOLDER / 'model.safetensors')[name][500, 3])
  found = verify(golden.FOLDER, other({name: value}))
  assert found.differing == {name: pytest.approx(7.5 - before)}
  assert not found.same


def test_signs_of_zero_count(other):
  name = 'transformer.ln_f.weight'
  zeros = np.zeros(256, ml_dtypes.bfloat16)
  first = other({name: zeros})
  second = first.with_name('second')
  shutil.copytree(first, second)
  tensors = load_file(first / 'model.safetensors') | {name: -zeros}
  save_file(tensors, second / 'model.safetensors')
  assert verify(first, second).differing == {name: 0.0}


def test_a_cast_is_said_and_compared(tmp_path):
  convert.from_hf(golden.FOLDER, tmp_path / 'wide', dtype='float32')
  found = verify(golden.FOLDER, tmp_path / 'wide')
  assert found.same
  assert found.cast == (('bfloat16', 'float32'),)


def test_what_only_one_of_them_has(other):
  names = load_file(golden.FOLDER / 'model.safetensors')
  decoder = other(dict.fromkeys(n for n in names if 'visual' in n))
  found = verify(golden.FOLDER, decoder)
  assert len(found.missing) == 42
  assert all('visual' in name for name in found.missing)
  assert not found.same
  assert verify(decoder, golden.FOLDER).added == found.missing


def test_settings(other):
  folder = other({})
  raw = json.loads((folder / 'config.json').read_text())
  raw['rotary_emb_base'] = 20000
  (folder / 'config.json').write_text(json.dumps(raw))
  (folder / 'qwen.tiktoken').write_text('IQ== 0\n')
  found = verify(golden.FOLDER, folder)
  assert found.settings == (
    'config.json: decoder rope_base is 10000.0 and 20000.0',
    'qwen.tiktoken is not the same in both',
  )
