"""The Int4 release, kept at 4 bits: there and back, and the same answers."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import qwenvl_jax
from qwenvl_jax.conversion import checkpoint_io, cli, convert, inspection
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import CheckpointError

INT4 = Path(__file__).parents[1] / 'goldens' / 'int4'
QKV, DOWN = 'transformer.h.1.attn.c_attn', 'transformer.h.0.mlp.c_proj'


@pytest.fixture(scope='module')
def expected():
  with np.load(INT4 / 'expected.npz') as arrays:
    return dict(arrays)


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """The golden, converted with its packed weights."""
  folder = tmp_path_factory.mktemp('kept') / 'ours'
  convert.from_hf(INT4, folder, keep_int4=True)
  return folder


@pytest.fixture(scope='module')
def opened(kept):
  return qwenvl_jax.load(kept, dtype='float32')


@pytest.fixture(scope='module')
def dequantized():
  return qwenvl_jax.load(INT4, dtype='float32')


@pytest.fixture
def changed(tmp_path):
  """Writes a copy of the golden with some tensors changed; its folder."""

  def write(changes):
    folder = tmp_path / 'changed'
    shutil.copytree(INT4, folder)
    tensors = load_file(INT4 / 'model.safetensors') | changes
    save_file(tensors, folder / 'model.safetensors')
    return folder

  return write


def test_logits_are_those_of_the_release(opened, dequantized, expected):
  logits = opened.logits(expected['ids'])
  assert np.abs(logits - expected['logits']).max() < 2e-4
  # The same weights bit for bit, summed in another order.
  plain = dequantized.logits(expected['ids'])
  assert np.abs(logits - plain).max() < 5e-5


def test_greedy_answers_are_the_same(opened, dequantized, expected):
  rows = [row[:n].tolist() for row in expected['ids'] for n in (12, 7)]
  new = opened.generate(rows, max_new_tokens=12)
  assert new == dequantized.generate(rows, max_new_tokens=12)
  assert len({tuple(row) for row in new}) > 1


def test_only_the_packed_kernels_keep_their_dtypes(kept):
  params = qwenvl_jax.load(kept).params
  decoder = params['decoder']
  assert decoder['embed'].dtype == ml_dtypes.bfloat16
  assert decoder['blocks_0']['attn']['q']['bias'].dtype == ml_dtypes.bfloat16
  kernel = decoder['blocks_0']['mlp']['down']['kernel']
  assert {k: x.dtype.name for k, x in kernel.items()} == {
    'words': 'int32',
    'zeros': 'int32',
    'scales': 'float16',
  }
  stored = checkpoint_io.read_params(kept, checkpoint_io.read_config(kept))
  assert stored['decoder']['embed'].dtype == np.float16


def test_the_release_opens_packed_without_conversion(opened, expected):
  direct = qwenvl_jax.load(INT4, dtype='float32', keep_int4=True)
  np.testing.assert_array_equal(
    direct.logits(expected['ids']), opened.logits(expected['ids'])
  )


def test_back_to_the_release_bit_for_bit(kept, tmp_path):
  convert.to_hf(kept, tmp_path / 'back', shard_bytes=600_000)
  shards = sorted((tmp_path / 'back').glob('*.safetensors'))
  assert len(shards) > 3
  back = {k: x for shard in shards for k, x in load_file(shard).items()}
  first = load_file(INT4 / 'model.safetensors')
  assert back.keys() == first.keys()
  for name, tensor in first.items():
    assert back[name].dtype == tensor.dtype
    assert back[name].tobytes() == tensor.tobytes(), name
  for name in ('config.json', 'quantize_config.json'):
    before = json.loads((INT4 / name).read_text())
    after = json.loads((tmp_path / 'back' / name).read_text())
    assert before.items() <= after.items()


def test_verify_in_every_layout(kept, tmp_path):
  convert.to_hf(kept, tmp_path / 'back')
  for folder in (kept, tmp_path / 'back'):
    found = verify(INT4, folder)
    assert found.same
    assert not found.cast
    assert found.tensors == 87 - 2 * (5 + 4)  # But for g_idx and no biases.
  convert.from_hf(INT4, tmp_path / 'plain')
  found = verify(kept, tmp_path / 'plain')
  assert found.same
  assert found.tensors == 49


def test_verify_sees_one_bit(kept, changed):
  words = load_file(INT4 / 'model.safetensors')[f'{QKV}.qweight'].copy()
  words[3, 300] ^= 1 << 12
  found = verify(changed({f'{QKV}.qweight': words}), kept)
  assert found.differing == {f'{QKV}.qweight': 4096.0}


def test_zero_points_of_every_group_and_output(changed, tmp_path, expected):
  """The release's are all 8."""
  rng = np.random.default_rng(0)
  tensors = load_file(INT4 / 'model.safetensors')
  folder = changed(
    {
      name: sum(
        rng.integers(6, 9, x.shape, np.uint32) << np.uint32(4 * i)
        for i in range(8)
      ).view(np.int32)
      for name, x in tensors.items()
      if name.endswith('.qzeros')
    }
  )
  convert.from_hf(folder, tmp_path / 'ours', keep_int4=True)
  plain = qwenvl_jax.load(folder, dtype='float32').logits(expected['ids'])
  packed = qwenvl_jax.load(tmp_path / 'ours', dtype='float32')
  assert np.abs(plain - expected['logits']).max() > 0.1
  assert np.abs(packed.logits(expected['ids']) - plain).max() < 5e-5
  convert.from_hf(folder, tmp_path / 'plain')
  assert verify(tmp_path / 'ours', tmp_path / 'plain').same


def test_inspect_counts_weights_and_stored_bytes(kept):
  report = inspection.inspect(kept)
  assert report.layout == 'Orbax, int4 (GPTQ) kept'
  assert not report.problems
  total = report.parts[-1]
  assert total.parameters == inspection.inspect(INT4).parts[-1].parameters
  weights = 2 * (4 * 256**2 + 3 * 256 * 384)
  packed = weights / 2 + weights / 128 * 2.5
  assert total.bytes == 2 * (total.parameters - weights) + packed
  assert any('for each 128 inputs' in note for note in report.notes)


def test_command(tmp_path, capsys):
  ours = tmp_path / 'ours'
  assert cli.main(['from-hf', str(INT4), str(ours), '--keep_int4']) == 0
  assert cli.main(['verify', str(INT4), str(ours)]) == 0
  assert '69 of 69 tensors' in capsys.readouterr().out
  assert cli.main(['inspect', str(ours)]) == 0
  config = json.loads((ours / 'config.json').read_text())
  assert config['quantization_config']['group_size'] == 128


def order_of_its_own():
  return {f'{QKV}.g_idx': np.arange(256, dtype=np.int32) % 2}


def other_groups():
  rng = np.random.default_rng(0)
  return {
    f'{DOWN}.scales': rng.normal(size=(6, 256)).astype(np.float16),
    f'{DOWN}.qzeros': np.zeros((6, 32), np.int32),
    f'{DOWN}.g_idx': np.arange(384, dtype=np.int32) // 64,
  }


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (order_of_its_own, r'h.1.attn.c_attn.g_idx .*an order of its own'),
    (other_groups, r'mlp.c_proj has a scale for each 64 inputs'),
  ],
)
def test_what_can_only_be_dequantized(changed, tmp_path, changes, message):
  folder = changed(changes())
  with pytest.raises(CheckpointError, match=message):
    convert.from_hf(folder, tmp_path / 'ours', keep_int4=True)
  assert not (tmp_path / 'ours').exists()
  convert.from_hf(folder, tmp_path / 'ours')


def test_a_bias_that_says_something_is_not_dropped(changed, tmp_path):
  folder = changed({f'{DOWN}.bias': np.ones(256, np.float16)})
  with pytest.raises(CheckpointError, match=r'c_proj.bias goes up to 1'):
    convert.from_hf(folder, tmp_path / 'ours', keep_int4=True)


def test_no_start_of_a_training(kept, tmp_path):
  vision = INT4.parent / 'openclip'
  with pytest.raises(CheckpointError, match='keeps int4 .*cannot be trained'):
    convert.init_stage1(vision, kept, tmp_path / 'start')


def test_nothing_to_keep(tmp_path):
  plain = INT4.parent / 'tiny'
  with pytest.raises(CheckpointError, match='no int4 weights .*leave out'):
    qwenvl_jax.load(plain, keep_int4=True)
  convert.from_hf(plain, tmp_path / 'ours')
  with pytest.raises(CheckpointError, match='no int4 weights: leave out'):
    qwenvl_jax.load(tmp_path / 'ours', keep_int4=True)
