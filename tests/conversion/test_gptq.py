"""The Int4 release, dequantized."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwenvl_jax
from qwenvl_jax.conversion import checkpoint_io, convert, gptq
from qwenvl_jax.conversion.json_schema import read_json
from qwenvl_jax.conversion.reader import open_released
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
