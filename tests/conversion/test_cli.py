"""The command, as a person meets it."""

import base64
import json
import shutil

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwenvl_jax
from qwenvl_jax.conversion import cli
from qwenvl_jax.conversion.job import byte_size
from qwenvl_jax.errors import ConfigError

OPENCLIP = golden.FOLDER.parent / 'openclip'


def run(*arguments):
  return cli.main([str(argument) for argument in arguments])


def test_there_back_and_verified(tmp_path, capsys):
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  assert run('from-hf', golden.FOLDER, ours) == 0
  assert run('to-hf', ours, back, '--max_shard_size', '1MB') == 0
  assert len(list(back.glob('*.safetensors'))) > 3
  assert run('verify', golden.FOLDER, back) == 0
  assert run('inspect', ours) == 0
  captured = capsys.readouterr()
  assert '61 of 61 tensors (2,154,672 values) are equal bit' in captured.out
  assert '2,154,672' in captured.out
  assert 'every tensor that the config asks for is there' in captured.out
  assert '4.3/4.3 MB' in captured.err


def test_what_differs_is_named(tmp_path, capsys):
  shutil.copy(golden.FOLDER / 'config.json', tmp_path)
  tensors = load_file(golden.FOLDER / 'model.safetensors')
  tensors['lm_head.weight'] = np.array(tensors['lm_head.weight'])
  tensors['lm_head.weight'][0, 0] = 3
  save_file(tensors, tmp_path / 'model.safetensors')
  assert run('verify', golden.FOLDER, tmp_path) == 1
  out = capsys.readouterr().out
  assert '60 of 61 tensors' in out
  assert '1 tensors differ: lm_head.weight (by up to' in out


def test_init_stage1(tmp_path, capsys):
  start = tmp_path / 'start'
  parts = ('--vision', OPENCLIP, '--decoder', golden.FOLDER)
  assert run('init-stage1', start, *parts, '--seed', 3) == 0
  assert 'the adapter is new (seed 3)' in capsys.readouterr().out
  assert run('inspect', start) == 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('inspect', 'nothing'), 'nothing does not exist, and is no hub id'),
    (('from-hf', 'nothing', 'x'), 'nothing does not exist, and is no hub id'),
    (('from-hf', OPENCLIP, 'x'), 'holds no released weights'),
    (('to-hf', OPENCLIP, 'x'), 'has no decoder and no adapter'),
    (('verify', golden.FOLDER, golden.FOLDER, '--logits'), 'no modeling_qwen'),
  ],
)
def test_one_error_and_no_traceback(arguments, message, capsys):
  assert run(*arguments) == 2
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error


def test_what_inspect_misses_is_its_status(tmp_path, capsys):
  shutil.copy(golden.FOLDER / 'config.json', tmp_path)
  tensors = load_file(golden.FOLDER / 'model.safetensors')
  del tensors['lm_head.weight']
  save_file(tensors, tmp_path / 'model.safetensors')
  assert run('inspect', tmp_path) == 2
  assert '1 missing: lm_head.weight' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('text', 'size'),
  [('2GB', 2 * 10**9), ('500 MB', 5 * 10**8), ('1.5GiB', 3 * 2**29), ('9', 9)],
)
def test_sizes(text, size):
  assert byte_size(text) == size


@pytest.mark.parametrize('text', ['big', '0MB', '-1GB', '5 apples'])
def test_no_sizes(text):
  with pytest.raises(ConfigError, match='write e.g. 500MB'):
    byte_size(text)


@pytest.mark.parametrize(('error', 'status'), [(0.0, 0), (0.01, 1)])
def test_logits_are_compared(tmp_path, monkeypatch, capsys, error, status):
  """With our own logits in the place of the released code's."""
  raw = json.loads((golden.FOLDER / 'config.json').read_text())
  raw['visual']['image_start_id'] = 256 + 214  # After bytes alone.
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  shutil.copy(golden.FOLDER / 'model.safetensors', tmp_path)
  ranks = (f'{base64.b64encode(bytes([i])).decode()} {i}\n' for i in range(256))
  (tmp_path / 'qwen.tiktoken').write_text(''.join(ranks))
  (tmp_path / 'modeling_qwen.py').write_text('')

  def released(folder, tokens):
    (start, *_), row = np.flatnonzero(tokens[0] == 470), tokens[0].tolist()
    path = bytes(x for x in row[start + 1 : start + 257] if x < 256).decode()
    handle = qwenvl_jax.load(folder, dtype='float32')
    pixels = handle.preprocess(path)[None]
    return np.asarray(handle.logits(tokens.astype(np.int32), pixels)) + error

  monkeypatch.setattr(cli.reference, 'released_logits', released)
  assert run('verify', tmp_path, tmp_path, '--logits') == status
  out = capsys.readouterr().out
  assert f'largest difference {error:.2e}' in out
  assert 'best token the same at 100.0%' in out
