"""PyTorch files: read in place, and never run."""

import json
import os
import zipfile

import golden
import numpy as np
import pytest

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import CheckpointError

torch = pytest.importorskip('torch')


def as_torch(array):
  bits = torch.from_numpy(array.view(np.int16).copy())
  return bits.view(torch.bfloat16)


def test_shards_convert_bit_for_bit(tmp_path):
  folder = tmp_path / 'released'
  folder.mkdir()
  tensors = open_released(golden.FOLDER)
  names, weight_map = sorted(tensors), {}
  for index in range(3):
    file = f'pytorch_model-{index + 1:05d}-of-00003.bin'
    shard = names[index::3]
    torch.save({n: as_torch(tensors[n].load()) for n in shard}, folder / file)
    weight_map |= dict.fromkeys(shard, file)
  index = folder / 'pytorch_model.bin.index.json'
  index.write_text(json.dumps({'weight_map': weight_map}))
  config = (golden.FOLDER / 'config.json').read_text()
  (folder / 'config.json').write_text(config)
  convert.from_hf(folder, tmp_path / 'ours')
  assert verify(golden.FOLDER, tmp_path / 'ours').same


def test_views_into_one_storage(tmp_path):
  storage = torch.arange(12, dtype=torch.float32)
  path = tmp_path / 'pytorch_model.bin'
  torch.save({'a': storage[:4], 'b': storage[4:].reshape(2, 4)}, path)
  tensors = open_released(tmp_path)
  np.testing.assert_array_equal(tensors['a'].load(), range(4))
  np.testing.assert_array_equal(tensors['b'].read(1, 2), [[8, 9, 10, 11]])


@pytest.mark.parametrize('where', ['value', 'whole'])
def test_a_pickle_does_not_run(tmp_path, where):
  witness = tmp_path / 'witness'

  class Evil:
    def __reduce__(self):
      return (open, (str(witness), 'w'))

  content = Evil() if where == 'whole' else {'a': torch.ones(3), 'b': Evil()}
  torch.save(content, tmp_path / 'pytorch_model.bin')
  with pytest.raises(CheckpointError, match='holds more than tensors'):
    open_released(tmp_path)
  assert not witness.exists()


def test_truncated(tmp_path):
  path = tmp_path / 'pytorch_model.bin'
  torch.save({'a': torch.ones(3000)}, path)
  path.write_bytes(path.read_bytes()[:2000])
  with pytest.raises(CheckpointError, match='pytorch_model.bin cannot be read'):
    open_released(tmp_path)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ([torch.ones(2)], 'holds a list'),
    ({'epoch': 3}, 'epoch is a int, not a tensor'),
    ({'a': torch.ones(2, dtype=torch.complex32)}, 'a has dtype complex32'),
    ({'a': torch.ones(2, 3).T}, 'make its tensors contiguous'),
  ],
)
def test_other_contents(tmp_path, content, message):
  torch.save(content, tmp_path / 'pytorch_model.bin')
  with pytest.raises(CheckpointError, match=message):
    open_released(tmp_path)


def test_the_format_before_torch_1_6(tmp_path):
  path = tmp_path / 'pytorch_model.bin'
  content = {'a': torch.ones(2)}
  torch.save(content, path, _use_new_zipfile_serialization=False)
  with pytest.raises(CheckpointError, match='cannot be read in place'):
    open_released(tmp_path)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
  """Writes the archive again, each record through `change(name, content)`."""
  with zipfile.ZipFile(path) as old:
    records = [(name, old.read(name)) for name in old.namelist()]
  with zipfile.ZipFile(path, 'w', compression) as new:
    for name, content in records:
      new.writestr(name, change(name, content))


def test_a_small_file_that_is_large_inside(tmp_path):
  path = tmp_path / 'pytorch_model.bin'
  torch.save({'a': torch.ones(2)}, path)
  rewritten(
    path,
    lambda n, x: x + bytes(300_000_000) if n.endswith('.pkl') else x,
    zipfile.ZIP_DEFLATED,
  )
  assert path.stat().st_size < 1_000_000
  with pytest.raises(CheckpointError, match=r"'\S+data.pkl' is compressed"):
    open_released(tmp_path)


def test_a_pickle_without_end(tmp_path):
  path = tmp_path / 'pytorch_model.bin'
  torch.save({'a': torch.ones(2)}, path)
  rewritten(path, lambda n, x: x + bytes(2**24) if 'pkl' in n else x)
  with pytest.raises(CheckpointError, match=r'its pickle has 16,777,'):
    open_released(tmp_path)


def test_a_tensor_that_is_larger_than_its_record(tmp_path):
  path = tmp_path / 'pytorch_model.bin'
  torch.save({'a': torch.ones(200), 'b': torch.zeros(200)}, path)
  rewritten(path, lambda n, x: x[:8] if n.endswith('data/0') else x)
  with pytest.raises(
    CheckpointError, match='a goes beyond its record|cannot be'
  ):
    open_released(tmp_path)


def test_names_that_are_no_names(tmp_path):
  torch.save({'a\x1b[2J': torch.ones(2)}, tmp_path / 'pytorch_model.bin')
  with pytest.raises(CheckpointError, match=r"called 'a\\x1b\[2J'"):
    open_released(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'pytorch_model.bin')
  with pytest.raises(CheckpointError, match='not a regular file'):
    open_released(tmp_path)
