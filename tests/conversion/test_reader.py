"""Reading released folders: shards, indices, damage."""

import collections
import json
import os
import random
import shutil

import golden
import numpy as np
import pytest
import safetensors
from fuzzing import checkpoints

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.json_schema import read_json
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


def entry(first, last, shape=(1,), kind='BF16'):
  return {'dtype': kind, 'shape': list(shape), 'data_offsets': [first, last]}


def write_safetensors(folder, header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path = folder / 'model.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
  return path


@pytest.mark.parametrize(
  ('header', 'message'),
  [
    ({'a': entry(-8, -6)}, 'tensor a has no shape or offsets'),
    ({'a': entry(0, 2), 'b': entry(1, 3)}, 'tensor b overlaps with a'),
    ({'a': entry(0, 2), 'b': entry(4, 6)}, 'tensor b leaves bytes .* after a'),
    ({'a': entry(2, 4)}, 'tensor a leaves bytes unused after the header'),
    ({'a': entry(0, 4)}, 'tensor a has 4 bytes, not what its shape'),
    ({'a': entry(0, 2)}, '4 bytes that belong to no tensor'),
    ({'a': entry(0, 2.0)}, 'tensor a has no shape or offsets'),
    ({'a': entry(0, 2, [10**30])}, 'tensor a has no shape or offsets'),
    ({'a': entry(0, 2, [True])}, 'tensor a has no shape or offsets'),
    ({'a': entry(0, 6, 'abc')}, 'tensor a has no shape or offsets'),
    ({'a': entry(0, 6, [3], ['BF16'])}, 'tensor a has dtype'),
    ({'a': [1]}, 'tensor a has no shape or offsets'),
    ({'a': None}, 'tensor a has no shape or offsets'),
    ({'a\x1b[2J': entry(0, 6, [3])}, r"called 'a\\x1b\[2J'"),
    ({'__metadata__': {'format': 3}}, 'no object of tensors'),
    (b'[]', 'no object of tensors'),
    (b'[' * 100_000, 'nested too deep'),
    (b'{"a": ' * 100_000, 'nested too deep'),
    (b'{"a": \xff}', 'is not valid JSON'),
  ],
)
def test_header_that_the_formats_own_reader_refuses(tmp_path, header, message):
  path = write_safetensors(tmp_path, header, b'012345')
  with pytest.raises(CheckpointError, match=message) as error:
    open_file(path)
  assert 'model.safetensors' in str(error.value)
  assert str(error.value).isprintable()


@pytest.mark.parametrize('kind', ['safetensors header', 'safetensors bytes'])
def test_what_the_formats_own_reader_refuses_is_refused(tmp_path, kind):
  counts = collections.Counter()
  for seed in range(400):
    ours = checkpoints.KINDS[kind](random.Random(seed), tmp_path)
    path = tmp_path / 'model.safetensors'
    try:
      with safetensors.safe_open(path, 'numpy'):
        theirs = 'accepted'
    except safetensors.SafetensorError:
      theirs = 'handled'
    counts[ours, theirs] += 1
  assert not counts['accepted', 'handled']
  assert counts['handled', 'handled'] > 300
  assert counts['accepted', 'accepted'] > 0


def test_tensors_in_any_order_and_empty_ones(tmp_path):
  header = {'b': entry(2, 6, [2]), 'none': entry(2, 2, [0]), 'a': entry(0, 2)}
  found = open_file(write_safetensors(tmp_path, header, b'012345'))
  assert found['a'].load().tobytes() == b'01'
  assert found['b'].load().tobytes() == b'2345'
  assert found['none'].load().shape == (0,)


def test_a_header_without_end(tmp_path):
  path = tmp_path / 'model.safetensors'
  with path.open('wb') as file:  # Sparse.
    file.write((2**30).to_bytes(8, 'little'))
    file.truncate(2**31)
  with pytest.raises(CheckpointError, match='header has 1,073,741,824 bytes'):
    open_file(path)


@pytest.mark.parametrize(
  'name', ['model.safetensors', 'config.json', 'model.safetensors.index.json']
)
def test_a_pipe_is_not_waited_for(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(CheckpointError, match=f'{name} .*not a regular file'):
    if name == 'config.json':
      read_json(tmp_path / name)
    else:
      open_released(tmp_path)


def test_of_several_files_what_transformers_takes(sharded):
  """An old index beside a new file, and the other way round."""
  shutil.copy(golden.FOLDER / 'model.safetensors', sharded)
  (sharded / 'pytorch_model.bin').write_bytes(b'')
  notes = []
  found = open_released(sharded, notes)
  assert {x.file.name for x in found.values()} == {'model.safetensors'}
  (note,) = notes
  assert note.startswith('model.safetensors is read, as transformers does')
  assert 'model.safetensors.index.json, pytorch_model.bin' in note
  (sharded / 'model.safetensors').unlink()
  assert len({x.file for x in open_released(sharded).values()}) > 2


@pytest.mark.parametrize(
  'weight_map',
  [
    None,
    [],
    {'a': 3},
    {'a': '../model.safetensors'},
    {'a': '/etc/passwd'},
    {'a': '..'},
    {'a': 'x' * 300},
    {'a': 'b\x1b'},
  ],
)
def test_an_index_names_files_of_its_folder(tmp_path, weight_map):
  path = tmp_path / 'model.safetensors.index.json'
  path.write_text(json.dumps({'weight_map': weight_map}))
  with pytest.raises(CheckpointError, match='weight_map is .* not an object'):
    open_released(tmp_path)
