"""Reading released folders: shards, indices, damage."""

import json
import shutil

import golden
import numpy as np
import pytest

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.reader import open_file, open_released
from qwenvl_jax.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path):
  """The golden checkpoint in several shards."""
  folder = tmp_path / 'sharded'
  convert.to_hf(golden.FOLDER, folder, shard_bytes=1_000_000)
  assert len(list(folder.glob('*.safetensors'))) > 2
  return folder


def test_shards_hold_what_the_single_file_holds(sharded):
  single, several = open_released(golden.FOLDER), open_released(sharded)
  assert single.keys() == several.keys()
  for name in single:
    assert single[name].load().tobytes() == several[name].load().tobytes()
  assert len({tensor.file for tensor in several.values()}) > 2
  sizes = [path.stat().st_size for path in sharded.glob('*.safetensors')]
  assert max(sizes) < 1_100_000


def test_missing_shard(sharded):
  victim = sorted(sharded.glob('*.safetensors'))[1]
  victim.unlink()
  with pytest.raises(CheckpointError, match=f'{victim.name} is missing'):
    open_released(sharded)


def test_truncated_shard(sharded):
  victim = sorted(sharded.glob('*.safetensors'))[0]
  victim.write_bytes(victim.read_bytes()[:-100])
  with pytest.raises(CheckpointError, match=r'truncated at .* \(tensor'):
    open_released(sharded)
  victim.write_bytes(b'12')
  with pytest.raises(CheckpointError, match='truncated at 2 bytes'):
    open_released(sharded)


def test_index_that_promises_too_much(sharded):
  index = sharded / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  content['weight_map']['ghost.weight'] = 'model-00001-of-00005.safetensors'
  files = sorted(set(content['weight_map'].values()))
  content['weight_map']['ghost.weight'] = files[0]
  index.write_text(json.dumps(content))
  with pytest.raises(CheckpointError, match='ghost.weight, but it does not'):
    open_released(sharded)


def test_tensor_in_two_shards(sharded):
  first, second = sorted(sharded.glob('*.safetensors'))[:2]
  shutil.copy(first, second)
  with pytest.raises(CheckpointError, match='stands in'):
    open_released(sharded)


def test_folder_without_weights(tmp_path):
  with pytest.raises(CheckpointError, match='holds no weights: expected one'):
    open_released(tmp_path)


def test_unsupported_dtype(tmp_path):
  header = json.dumps(
    {'odd': {'dtype': 'F8_E4M3', 'shape': [1], 'data_offsets': [0, 1]}}
  ).encode()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + b'0')
  with pytest.raises(CheckpointError, match='odd has dtype F8_E4M3'):
    open_file(path)


def test_torch_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'torch', None)
  path = tmp_path / 'pytorch_model.bin'
  path.write_bytes(b'')
  with pytest.raises(CheckpointError, match=r'qwenvl_jax\[torch\]'):
    open_released(tmp_path)


def test_tensor_twice_in_one_file(tmp_path):
  entry = '"same": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}'
  header = f'{{{entry}, {entry}}}'.encode()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(len(header).to_bytes(8, 'little') + header + b'00')
  with pytest.raises(CheckpointError, match='tensor same stands in it twice'):
    open_file(path)


def test_index_that_names_the_wrong_shard(sharded):
  index = sharded / 'model.safetensors.index.json'
  content = json.loads(index.read_text())
  files = sorted(set(content['weight_map'].values()))
  content['weight_map']['transformer.wte.weight'] = files[-1]
  index.write_text(json.dumps(content))
  with pytest.raises(CheckpointError, match=f'{files[-1]} holds transformer.w'):
    open_released(sharded)


def test_file_that_shrinks_after_it_was_opened(sharded):
  tensors = open_released(sharded)
  victim = tensors['lm_head.weight']
  victim.file.write_bytes(victim.file.read_bytes()[:3000])
  with pytest.raises(CheckpointError, match=r'truncated .* \(tensor lm_head'):
    victim.load()


def test_rows_are_read_alone():
  tensor = open_released(golden.FOLDER)['transformer.wte.weight']
  np.testing.assert_array_equal(tensor.read(7, 9), tensor.load()[7:9])
