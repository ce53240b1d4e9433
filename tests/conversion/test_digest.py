"""A digest is of what a checkpoint holds, wherever it lies."""

import shutil

import reciter

from qwenvl_jax.conversion.digest import digest


def test_it_follows_contents_alone(tmp_path):
  first, second = tmp_path / 'first', tmp_path / 'other' / 'second'
  reciter.save(first)
  shutil.copytree(first, second)
  (second / 'notes.txt').write_text('not of the checkpoint')
  assert digest(first) == digest(second)
  vocabulary = second / 'qwen.tiktoken'
  vocabulary.write_bytes(vocabulary.read_bytes() + b'\n')
  assert digest(first) != digest(second)
  shutil.copy(first / 'qwen.tiktoken', vocabulary)
  weights = max(
    (x for x in second.rglob('*') if x.is_file()),
    key=lambda x: x.stat().st_size,
  )
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(data)
  assert digest(first) != digest(second)
