"""What travels beside the weights, and what is said of it."""

import json
import shutil

import golden
import pytest

import qwenvl_jax
from qwenvl_jax.conversion import convert, inspection
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.errors import CheckpointError, QwenVLError


@pytest.fixture
def folder(tmp_path):
  """A copy of the golden checkpoint with a vocabulary and chat settings."""
  folder = tmp_path / 'released'
  folder.mkdir()
  for name in ('config.json', 'model.safetensors'):
    shutil.copy(golden.FOLDER / name, folder)
  (folder / 'qwen.tiktoken').write_text(golden.vocabulary())
  (folder / 'generation_config.json').write_text('{"chat_format": "chatml"}')
  return folder


def test_a_whole_folder_has_no_notes(folder, tmp_path):
  assert convert.from_hf(folder, tmp_path / 'ours').notes == ()
  assert assets.is_chat(tmp_path / 'ours')
  handle = qwenvl_jax.load(tmp_path / 'ours')
  assert handle.tokenizer.img_start_id == handle.config.image_start_id == 500


def test_no_vocabulary_is_said(folder, tmp_path):
  (folder / 'qwen.tiktoken').unlink()
  (note,) = convert.from_hf(folder, tmp_path / 'ours').notes
  assert note.startswith(f'{folder} has no qwen.tiktoken')
  (note,) = convert.to_hf(tmp_path / 'ours', tmp_path / 'back').notes
  assert 'has no qwen.tiktoken' in note


def test_a_base_model_does_not_become_chat(folder, tmp_path):
  (folder / 'generation_config.json').unlink()
  (note,) = convert.from_hf(folder, tmp_path / 'ours').notes
  assert "the result is no Chat model (its chat_format is 'raw')" in note
  written = tmp_path / 'ours' / 'generation_config.json'
  settings = json.loads(written.read_text())
  assert settings['chat_format'] == 'raw'
  assert settings['eos_token_id'] == settings['pad_token_id'] == 286
  assert inspection.inspect(tmp_path / 'ours').family == 'Qwen-VL'


@pytest.mark.parametrize(
  ('ranks', 'told'),
  [
    (285, 'has 285 ranks, so that <img> is 499, but image_start_id .* is 500'),
    (287, 'has 287 ranks, so that <img> is 501'),
  ],
)
def test_a_vocabulary_cut_at_the_end_of_a_line(folder, tmp_path, ranks, told):
  (folder / 'qwen.tiktoken').write_text(golden.vocabulary(ranks))
  for use in (
    lambda: convert.from_hf(folder, tmp_path / 'ours'),
    lambda: qwenvl_jax.load(folder),
  ):
    with pytest.raises(CheckpointError, match=f'qwen.tiktoken {told}'):
      use()
  assert not (tmp_path / 'ours').exists()
  (problem,) = inspection.inspect(folder).problems
  assert f'has {ranks} ranks' in problem


@pytest.mark.parametrize(
  ('name', 'text', 'told'),
  [
    ('qwen.tiktoken', 'IQ== 0\n', 'lacks 255 of the 256 single bytes'),
    ('qwen.tiktoken', '!', 'line 1: no rank'),
    ('generation_config.json', '{', 'is not valid JSON'),
    ('generation_config.json', '[]', 'does not hold a JSON object'),
    ('generation_config.json', '{"chat_format": 3}', 'chat_format is 3, not a'),
  ],
)
def test_damage_is_found_before_anything_is_written(
  folder, tmp_path, name, text, told
):
  (folder / name).write_text(text)
  with pytest.raises(QwenVLError, match=f'{name}.*{told}'):
    convert.from_hf(folder, tmp_path / 'ours')
  assert not (tmp_path / 'ours').exists()
  (problem,) = inspection.inspect(folder).problems
  assert name in problem


def test_a_vocabulary_that_grows(folder, tmp_path):
  made = convert.from_hf(folder, tmp_path / 'ours', vocab_size=640, seed=4)
  assert made.new_rows == 128
  config = json.loads((tmp_path / 'ours' / 'config.json').read_text())
  assert config['vocab_size'] == 640
  wanted = qwenvl_jax.load(folder).params['decoder']
  found = qwenvl_jax.load(tmp_path / 'ours').params['decoder']
  assert found['embed'].shape == (640, 256)
  assert (found['embed'][:512] == wanted['embed']).all()
  assert (found['lm_head']['kernel'][:512] == wanted['lm_head']['kernel']).all()
  assert 0.015 < found['embed'][512:].astype('float32').std() < 0.025
  with pytest.raises(CheckpointError, match='rows are added, not removed'):
    convert.from_hf(folder, tmp_path / 'less', vocab_size=500)


def test_image_ids_beyond_the_vocabulary(folder, tmp_path):
  raw = json.loads((folder / 'config.json').read_text())
  raw['visual']['image_start_id'] = 510
  (folder / 'config.json').write_text(json.dumps(raw))
  (folder / 'qwen.tiktoken').write_text(golden.vocabulary(296))
  for use in (
    lambda: convert.from_hf(folder, tmp_path / 'ours'),
    lambda: qwenvl_jax.load(folder),
  ):
    with pytest.raises(CheckpointError, match='ids up to 512 .* is 512: corr'):
      use()
  convert.from_hf(folder, tmp_path / 'ours', vocab_size=513)
