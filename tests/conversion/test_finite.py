"""Values that are not finite are counted, wherever a checkpoint is read."""

import shutil

import golden
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax.conversion import cli, convert
from qwenvl_jax.conversion.finite import count_not_finite, describe
from qwenvl_jax.conversion.inspection import inspect
from qwenvl_jax.conversion.verify import verify

EMBED, LN_F = 'transformer.wte.weight', 'transformer.ln_f.weight'
INT4 = golden.FOLDER.parent / 'int4'


@pytest.mark.parametrize(
  'dtype', [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]
)
def test_the_same_count_as_numpy(dtype):
  """Of all bit patterns of 16 bits, and of the largest finite values."""
  bits = np.arange(2**16, dtype=np.uint16)
  kind = np.dtype(dtype)
  values = np.zeros((kind.itemsize // 2, 2**16), np.uint16)
  values[-1] = bits  # The highest: sign, exponent, first bits of the fraction.
  values = np.ascontiguousarray(values.T).view(kind)
  with np.errstate(invalid='ignore'):
    wanted = np.count_nonzero(~np.isfinite(values.astype(np.float64)))
  assert wanted > 0
  assert count_not_finite(values) == wanted
  assert count_not_finite(np.tile(values, (5, 1))) == 5 * wanted
  largest = np.array([ml_dtypes.finfo(dtype).max] * 3, dtype)
  assert count_not_finite(np.stack([largest, -largest])) == 0
  assert count_not_finite(values[:0]) == 0


def test_integers_are_finite():
  assert count_not_finite(np.full(9, -1, np.int32)) == 0


def test_what_is_said():
  assert describe({}) is None
  assert describe({'a': 0}) is None
  text = describe({chr(97 + i): 10 - i for i in range(7)})
  assert text.startswith('49 values are not finite (NaN or infinite): a (10), ')
  assert 'e (6) ..; the checkpoint is damaged' in text


@pytest.fixture
def damaged(tmp_path):
  """The golden with three NaN in the embedding and an infinity in a norm."""
  tensors = load_file(golden.FOLDER / 'model.safetensors')
  tensors = {name: np.array(x) for name, x in tensors.items()}
  tensors[EMBED][[3, 300, 511], 7] = np.nan
  tensors[LN_F][0] = -np.inf
  folder = tmp_path / 'damaged'
  folder.mkdir()
  save_file(tensors, folder / 'model.safetensors')
  shutil.copy(golden.FOLDER / 'config.json', folder)
  return folder


SAID = '4 values are not finite (NaN or infinite): decoder/embed (3), decoder/'


def test_conversions_say_it(damaged, tmp_path):
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  assert convert.from_hf(damaged, ours).notes[0].startswith(SAID)
  assert convert.to_hf(ours, back).notes[0].startswith(SAID)
  found = verify(damaged, back)
  assert found.same
  assert found.notes[0].startswith(SAID)
  assert verify(golden.FOLDER, golden.FOLDER).notes == ()


def test_inspect_counts_them(damaged, tmp_path, capsys):
  convert.from_hf(damaged, tmp_path / 'ours')
  for folder in (damaged, tmp_path / 'ours'):
    (problem,) = inspect(folder, values=True).problems
    assert problem.startswith(SAID)
    assert inspect(folder).problems == ()
    assert cli.main(['inspect', str(folder)]) == 2
    assert f'error: {SAID}' in capsys.readouterr().err
    assert cli.main(['inspect', '--headers', str(folder)]) == 0


def test_scales_of_packed_kernels(tmp_path):
  shutil.copytree(INT4, tmp_path, dirs_exist_ok=True)
  tensors = load_file(INT4 / 'model.safetensors')
  name = 'transformer.h.0.mlp.w1.scales'
  tensors[name] = tensors[name].copy()
  tensors[name][0, 5] = np.inf
  save_file(tensors, tmp_path / 'model.safetensors')
  made = convert.from_hf(tmp_path, tmp_path / 'ours', keep_int4=True)
  said = '1 values are not finite (NaN or infinite): decoder/blocks/mlp/up/'
  assert made.notes[0].startswith(said)
  (problem,) = inspect(tmp_path / 'ours', values=True).problems
  assert problem.startswith(said)
