"""The Int4 release, dequantized."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwenvl_jax
from qwenvl_jax.conversion import checkpoint_io, convert, gptq
from qwenvl_jax.conversion.json_schema import read_json
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import CheckpointError

INT4 = Path(__file__).parents[1] / 'goldens' / 'int4'
WEIGHT = 'transformer.h.0.attn.c_attn'


@pytest.fixture(scope='module')
def expected():
  with np.load(INT4 / 'expected.npz') as arrays:
    return dict(arrays)


@pytest.fixture
def changed(tmp_path):
  """Writes a copy of the golden with some tensors changed; its folder."""
  tensors = load_file(INT4 / 'model.safetensors')

  def write(changes):
    for name, value in changes.items():
      if value is None:
        del tensors[name]
      else:
        tensors[name] = value
    save_file(tensors, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text((INT4 / 'config.json').read_text())
    return tmp_path

  return tensors, write


def dequantized(folder):
  config = checkpoint_io.read_config(folder)
  return gptq.dequantized(folder, open_released(folder), config)


def test_weights(expected):
  tensors = dequantized(INT4)
  names = [n for n in expected if n.startswith('dequantized/')]
  assert len(names) == 2
  for name in names:
    tensor = tensors[name.removeprefix('dequantized/')]
    np.testing.assert_array_equal(tensor.load(), expected[name])
    np.testing.assert_array_equal(tensor.read(8, 24), expected[name][8:24])


def test_logits(expected):
  handle = qwenvl_jax.load(INT4, dtype='float32')
  logits = handle.logits(expected['ids'])
  assert np.abs(logits - expected['logits']).max() < 2e-4


def test_converts_to_bfloat16(tmp_path):
  convert.from_hf(INT4, tmp_path / 'ours')
  config = read_json(tmp_path / 'ours' / 'config.json')
  assert config['torch_dtype'] == 'bfloat16'
  assert 'quantization_config' not in config
  params = checkpoint_io.read_params(
    tmp_path / 'ours', checkpoint_io.read_config(tmp_path / 'ours')
  )
  kernel = np.asarray(params['decoder']['blocks']['attn']['q']['kernel'][0])
  weight = dequantized(INT4)[f'{WEIGHT}.weight'].load()
  wanted = weight[:256].T.astype(kernel.dtype)
  np.testing.assert_array_equal(kernel.reshape(256, 256), wanted)


def test_zero_points_and_groups_in_any_order(changed):
  """What the release does not use: every group and column has its own."""
  tensors, write = changed
  rng = np.random.default_rng(0)
  zeros = rng.integers(0, 15, (2, 768))
  groups = rng.permutation(np.repeat([0, 1], 128)).astype(np.int32)
  packed = np.zeros((2, 96), np.uint32)
  for i in range(8):
    packed |= zeros[:, i::8].astype(np.uint32) << np.uint32(4 * i)
  folder = write(
    {f'{WEIGHT}.qzeros': packed.view(np.int32), f'{WEIGHT}.g_idx': groups}
  )
  words = tensors[f'{WEIGHT}.qweight'].view(np.uint32)
  scales = tensors[f'{WEIGHT}.scales'].astype(np.float32)
  weight = dequantized(folder)[f'{WEIGHT}.weight'].load()
  for out, i in ((0, 0), (5, 9), (700, 255), (767, 100)):
    value = int(words[i // 8, out] >> np.uint32(4 * (i % 8))) & 15
    group = groups[i]
    wanted = scales[group, out] * (value - (zeros[group, out] + 1))
    assert weight[out, i] == wanted


def test_a_bias_that_is_not_zero_is_not_dropped(changed):
  tensors, write = changed
  bias = tensors['transformer.h.1.mlp.w2.bias'].copy()
  bias[3] = 0.25
  folder = write({'transformer.h.1.mlp.w2.bias': bias})
  with pytest.raises(CheckpointError, match=r'h.1.mlp.w2.bias goes up to 0.25'):
    dequantized(folder)


@pytest.mark.parametrize(
  ('kind', 'value', 'message'),
  [
    ('scales', None, 'c_attn.qweight is there, but .*c_attn.scales missing'),
    ('qzeros', np.zeros((2, 95), np.int32), r'qzeros is int32 \[2, 95\], not'),
    ('g_idx', np.full(256, 2, np.int32), 'g_idx names groups'),
  ],
)
def test_damage_is_named(changed, kind, value, message):
  _, write = changed
  folder = write({f'{WEIGHT}.{kind}': value})
  with pytest.raises(CheckpointError, match=message):
    dequantized(folder)[f'{WEIGHT}.weight'].load()


def plus_one(words: np.ndarray) -> np.ndarray:
  """Packed values, each one higher."""
  step = sum(1 << 4 * i for i in range(8))
  return (words.view(np.uint32) + np.uint32(step)).view(np.int32)


@pytest.fixture
def second_format(tmp_path):
  """Writes the golden with every stored zero point one higher; its folder."""

  def write(form, name='v2'):
    folder = tmp_path / name
    folder.mkdir()
    tensors = load_file(INT4 / 'model.safetensors')
    save_file(
      {k: plus_one(x) if 'qzeros' in k else x for k, x in tensors.items()},
      folder / 'model.safetensors',
    )
    raw = read_json(INT4 / 'config.json')
    quantize = read_json(INT4 / 'quantize_config.json')
    if form is not None:
      raw['quantization_config']['checkpoint_format'] = form
      quantize['checkpoint_format'] = form
    (folder / 'config.json').write_text(json.dumps(raw))
    (folder / 'quantize_config.json').write_text(json.dumps(quantize))
    return folder

  return write


def test_gptq_v2_gives_the_same_logits(second_format, expected, tmp_path):
  folder = second_format('gptq_v2')
  plain = qwenvl_jax.load(folder, dtype='float32').logits(expected['ids'])
  wanted = qwenvl_jax.load(INT4, dtype='float32').logits(expected['ids'])
  np.testing.assert_array_equal(plain, wanted)
  packed = qwenvl_jax.load(folder, dtype='float32', keep_int4=True)
  assert np.abs(packed.logits(expected['ids']) - wanted).max() < 5e-5
  convert.from_hf(folder, tmp_path / 'ours', keep_int4=True)
  kept = qwenvl_jax.load(tmp_path / 'ours', dtype='float32')
  np.testing.assert_array_equal(
    kept.logits(expected['ids']), packed.logits(expected['ids'])
  )
  # Dequantized, both formats are one.
  convert.from_hf(folder, tmp_path / 'plain')
  assert 'quantization_config' not in read_json(
    tmp_path / 'plain' / 'config.json'
  )
  assert verify(INT4, tmp_path / 'plain').same
  assert verify(tmp_path / 'ours', tmp_path / 'plain').same


def test_to_hf_keeps_the_format(second_format, tmp_path):
  folder = second_format('gptq_v2')
  convert.from_hf(folder, tmp_path / 'ours', keep_int4=True)
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  first = load_file(folder / 'model.safetensors')
  back = load_file(tmp_path / 'back' / 'model.safetensors')
  assert back.keys() == first.keys()
  assert all(back[name].tobytes() == x.tobytes() for name, x in first.items())
  raw = read_json(tmp_path / 'back' / 'config.json')
  assert raw['quantization_config']['checkpoint_format'] == 'gptq_v2'
  quantize = read_json(tmp_path / 'back' / 'quantize_config.json')
  assert quantize['checkpoint_format'] == 'gptq_v2'
  assert verify(folder, tmp_path / 'back').same
  # The same words in another format are other weights.
  assert not verify(INT4, tmp_path / 'ours').same


@pytest.mark.parametrize('form', [None, 'gptq'])
def test_symmetric_weights_of_the_other_format(second_format, form, tmp_path):
  folder = second_format(form)
  message = (
    "stored zero points are 8, as 'gptq_v2' .* checkpoint_format is 'gpt"
  )
  for keep in (False, True):
    with pytest.raises(CheckpointError, match=message):
      convert.from_hf(folder, tmp_path / 'ours', keep_int4=keep)
  raw = read_json(INT4 / 'quantize_config.json')
  (folder / 'quantize_config.json').write_text(json.dumps(raw | {'sym': False}))
  convert.from_hf(folder, tmp_path / 'ours')


def test_the_release_called_gptq_v2(tmp_path):
  shutil.copytree(INT4, tmp_path / 'wrong')
  for name in ('config.json', 'quantize_config.json'):
    raw = read_json(INT4 / name)
    raw.get('quantization_config', raw)['checkpoint_format'] = 'gptq_v2'
    (tmp_path / 'wrong' / name).write_text(json.dumps(raw))
  with pytest.raises(CheckpointError, match="zero points are 7, as 'gptq' "):
    dequantized(tmp_path / 'wrong')


@pytest.mark.parametrize('name', ['config.json', 'quantize_config.json'])
def test_only_one_file_says_it(second_format, name, expected, tmp_path):
  folder = second_format('gptq_v2')
  shutil.copy(INT4 / name, folder)
  convert.from_hf(folder, tmp_path / 'ours', keep_int4=True)
  packed = qwenvl_jax.load(tmp_path / 'ours', dtype='float32')
  logits = packed.logits(expected['ids'])
  assert np.abs(logits - expected['logits']).max() < 2e-4


def test_two_files_that_contradict_each_other(second_format):
  folder = second_format('gptq_v2')
  raw = read_json(INT4 / 'quantize_config.json')
  raw['checkpoint_format'] = 'gptq'
  (folder / 'quantize_config.json').write_text(json.dumps(raw))
  message = "quantize_config.json 'gptq' and config.json 'gptq_v2'"
  with pytest.raises(CheckpointError, match=message):
    dequantized(folder)


@pytest.mark.parametrize(
  ('value', 'message'),
  [('marlin', "'marlin', not 'gptq' or 'gptq_v2'"), (2, '2, not'), ([], 'not')],
)
def test_formats_that_are_not_known(tmp_path, value, message):
  shutil.copytree(INT4, tmp_path, dirs_exist_ok=True)
  raw = read_json(INT4 / 'quantize_config.json') | {'checkpoint_format': value}
  (tmp_path / 'quantize_config.json').write_text(json.dumps(raw))
  with pytest.raises(CheckpointError, match=message):
    dequantized(tmp_path)


@pytest.mark.parametrize('kind', ['qweight', 'scales'])
def test_packed_tensors_without_axes(changed, kind):
  _, write = changed
  folder = write({f'{WEIGHT}.{kind}': np.zeros((), np.int32)})
  with pytest.raises(CheckpointError, match='which are no matrices'):
    dequantized(folder)
