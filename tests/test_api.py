"""The public face against the goldens."""

import importlib.metadata
import sys
import types

import golden
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import qwenvl_jax
from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.families.qwen_vl.assets import write_assets
from qwenvl_jax.errors import CheckpointError, ConfigError, DataError
from qwenvl_jax.model.int8 import quantize_params
from qwenvl_jax.model.stacking import stack_layers


@pytest.fixture(scope='module')
def handle():
  return qwenvl_jax.load(golden.FOLDER, dtype='float32')


def test_a_handle_says_what_it_is_in_one_line(handle):
  told = repr(handle)
  assert str(golden.FOLDER) in told and '(released layout)' in told
  count = sum(x.size for x in jax.tree.leaves(handle.params))
  assert f'{count / 1e6:.2f}M parameters, float32' in told
  assert 'pictures of 112 px' in told and 'on 1 x cpu' in told
  assert '\n' not in told and len(told) < 300


def test_the_package_shows_what_it_offers():
  assert {'QwenVLModel', 'digest', 'load'} <= set(dir(qwenvl_jax))
  assert qwenvl_jax.Handle is qwenvl_jax.QwenVLModel
  assert qwenvl_jax.__version__ == importlib.metadata.version('qwenvl_jax')


def test_a_hub_id_is_downloaded(monkeypatch):
  asked = []

  def download(name, **_):
    asked.append(name)
    return str(golden.FOLDER)

  module = types.SimpleNamespace(snapshot_download=download)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
  opened = qwenvl_jax.load('Qwen/Qwen-VL-Chat')
  assert asked == ['Qwen/Qwen-VL-Chat']
  assert opened.config.vision.image_size == 112


def _images(ids):
  found = [golden.spans(row)[1] for row in ids]
  return np.concatenate(found)


def test_encode_images_and_preprocess(handle):
  pixels = np.stack(
    [
      handle.preprocess(str(golden.FOLDER / name))
      for name in ('wide.png', 'tall.png')
    ]
  )
  wanted = golden.expected()['vision/112/features']
  assert np.abs(handle.encode_images(pixels) - wanted).max() < golden.ATOL


@pytest.mark.parametrize('name', ['text', 'two_images'])
def test_logits(handle, name):
  e = golden.expected()
  ids = e[f'eval/{name}/ids']
  images = None if name == 'text' else _images(ids)
  logits = np.asarray(handle.logits(ids, images))
  wanted = e[f'eval/{name}/logits_last64']
  assert np.abs(logits[:, -64:] - wanted).max() < golden.ATOL


def test_loss(handle):
  e = golden.expected()
  ids = e['train/ids']
  loss = handle.loss(ids, e['train/labels'], e['train/mask'], _images(ids))
  assert float(loss) == pytest.approx(float(e['train/loss']), rel=1e-5)


def test_generate(handle):
  e = golden.expected()
  ids = np.atleast_2d(e['generate/one_image/ids'])
  wanted = e['generate/one_image/new'].reshape(-1).tolist()
  new = handle.generate(ids, _images(ids), max_new_tokens=len(wanted))
  assert new == [wanted]


def test_wrong_number_of_images(handle):
  ids = golden.expected()['eval/two_images/ids']
  with pytest.raises(DataError, match='2 <img> spans .* 1 images'):
    handle.logits(ids, _images(ids)[:1])
  with pytest.raises(DataError, match='2 <img> spans .* 0 images'):
    handle.logits(ids)


def test_converted_folder_opens_alike(handle, tmp_path):
  convert.from_hf(golden.FOLDER, tmp_path / 'ours')
  ours = qwenvl_jax.load(tmp_path / 'ours')
  assert ours.config.dtype == 'bfloat16'
  for name in ('vision', 'adapter', 'decoder'):
    assert ours.params[name].keys() == handle.params[name].keys()
  ids = golden.expected()['eval/text/ids']
  again = qwenvl_jax.load(tmp_path / 'ours', dtype='float32').logits(ids)
  np.testing.assert_array_equal(again, handle.logits(ids))


def test_a_run_of_a_part_says_so_and_names_whole_models(handle, tmp_path):
  whole, part = tmp_path / 'stage3', tmp_path / 'vision'
  write_assets(part, handle.config)
  with ocp.PyTreeCheckpointer() as checkpointer:
    save = checkpointer.save
    params = stack_layers(handle.params)
    save(whole / 'checkpoints' / '9' / 'params', params)
    held = {'vision': handle.params['vision'], 'head': np.ones(3)}
    save(part / 'checkpoints' / '9' / 'params', held)
  with pytest.raises(CheckpointError) as error:
    qwenvl_jax.load(part)
  assert 'holds head, vision and lacks decoder and adapter' in str(error.value)
  assert f'whole models beside it: {whole}' in str(error.value)


def test_without_vocabulary(handle):
  assert handle.tokenizer is None
  with pytest.raises(CheckpointError, match='no vocabulary'):
    handle.chat('hello')


def test_one_prompt_is_no_list_of_them(handle):
  with pytest.raises(DataError, match=r'generate\(\[ids\]\)'):
    handle.generate([1, 2, 3])


def test_a_dtype_that_is_none(tmp_path):
  with pytest.raises(ConfigError, match="'bf16' is no number.*'bfloat16'"):
    qwenvl_jax.load(tmp_path, dtype='bf16')


def test_folder_that_is_none(tmp_path):
  with pytest.raises(CheckpointError, match='does not exist'):
    qwenvl_jax.load(tmp_path / 'nothing')
  with pytest.raises(CheckpointError, match='config.json does not exist'):
    qwenvl_jax.load(tmp_path)


def test_a_folder_of_checkpoints_names_them(tmp_path):
  (tmp_path / 'stage3').mkdir()
  (tmp_path / 'stage3' / 'config.json').write_text('{}')
  with pytest.raises(CheckpointError, match=r'name one of .*stage3'):
    qwenvl_jax.load(tmp_path)


def test_kernels_are_rounded_to_8_bits_as_they_are_read(handle):
  rounded = qwenvl_jax.load(golden.FOLDER, dtype='float32', int8=True)
  wanted = quantize_params(handle.params)
  jax.tree.map(np.testing.assert_array_equal, rounded.params, wanted)
  ids = golden.expected()['generate/text/ids'].reshape(1, -1)
  assert len(rounded.generate(ids, max_new_tokens=4)[0]) == 4


def test_beams_and_scores(handle):
  e = golden.expected()
  ids = e['generate/one_image/ids'].reshape(1, -1)
  new = e['generate/beam3/new'].reshape(-1).tolist()
  found = handle.beam_search(
    ids, _images(ids), beams=3, max_new_tokens=len(new), length_penalty=0.0
  )
  assert found[0].ids == new
  scored = handle.score(ids, [new], _images(ids))[0]
  # A prompt and its answer are read as one, past `seq_length` or not.
  assert scored.logprobs.sum() == pytest.approx(found[0].score, abs=1e-3)
