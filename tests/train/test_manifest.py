import random

import pytest

from qwenvl_jax.train import manifest


@pytest.fixture
def folder(tmp_path):
  step = tmp_path / '12'
  (step / 'params' / 'd').mkdir(parents=True)
  (step / 'data').mkdir()
  (step / 'params' / '_METADATA').write_text('{}')
  (step / 'params' / 'd' / 'a').write_bytes(bytes(range(100)))
  (step / 'data' / 'process_0-of-1.json').write_text('{"row": 64}')
  manifest.write_checksums(step)
  return step


def files(folder):
  return sorted(p for p in folder.rglob('*') if p.is_file())


def test_a_whole_checkpoint_is_in_order(folder):
  assert manifest.verify(folder) is None
  assert [p.name for p in folder.parent.iterdir()] == ['12']
  (folder / manifest.FILE).unlink()
  assert manifest.verify(folder) is None


@pytest.mark.parametrize('which', range(4))
def test_every_kind_of_damage_to_every_file_is_noticed(folder, which):
  file = files(folder)[which]
  content = file.read_bytes()
  seed = random.randrange(1 << 32)
  print('seed', seed)
  rng = random.Random(seed)
  for _ in range(20):
    flipped = bytearray(content)
    flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(flipped)
    assert manifest.verify(folder) is not None
  if file.name != manifest.FILE:
    file.write_bytes(content[:-1])
    assert f'has {len(content) - 1} bytes' in manifest.verify(folder)
    file.unlink()
    assert 'is missing' in manifest.verify(folder)


def test_large_files_are_measured_only(folder):
  manifest.write_checksums(folder, limit=50)
  file = folder / 'params' / 'd' / 'a'
  file.write_bytes(bytes(100))
  assert manifest.verify(folder) is None
  file.write_bytes(bytes(99))
  assert 'params/d/a has 99 bytes' in manifest.verify(folder)
