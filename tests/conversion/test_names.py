"""Names before and beside the released ones."""

import shutil

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.families import openclip
from qwenvl_jax.conversion.families.names import TensorNames
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import CheckpointError, ConfigError

OPENCLIP = golden.FOLDER.parent / 'openclip'


@pytest.fixture
def renamed(tmp_path):
  """Writes the golden checkpoint under other names; its folder."""

  def write(rename, extra=()):
    folder = tmp_path / 'renamed'
    folder.mkdir()
    shutil.copy(golden.FOLDER / 'config.json', folder)
    tensors = load_file(golden.FOLDER / 'model.safetensors')
    tensors = {rename(name): x for name, x in tensors.items()}
    tensors |= {name: np.ones(3, np.float32) for name in extra}
    save_file(tensors, folder / 'model.safetensors')
    return folder

  return write


@pytest.mark.parametrize(
  'prefix',
  ['module.', 'base_model.model.', '_orig_mod.', 'module.model.', 'model.'],
)
def test_a_prefix_of_all_names(renamed, tmp_path, prefix):
  folder = renamed(lambda name: prefix + name)
  made = convert.from_hf(folder, tmp_path / 'ours')
  assert f'all 61 tensors are read without {prefix!r}' in made.notes
  assert verify(golden.FOLDER, tmp_path / 'ours').same


def test_a_prefix_of_some_names(renamed, tmp_path):
  folder = renamed(lambda n: n if n == 'lm_head.weight' else f'module.{n}')
  message = r"has 'module.' before its name, but lm_head.weight has nothing: sa"
  with pytest.raises(CheckpointError, match=message):
    convert.from_hf(folder, tmp_path / 'ours')


def test_constants_are_left_out(renamed, tmp_path):
  extra = (
    'transformer.rotary_emb.inv_freq',
    'transformer.h.0.attn.rotary_emb.inv_freq',
    'transformer.h.1.attn.masked_bias',
    'transformer.h.1.attn.bias',
    'transformer.logn_tensor',
  )
  made = convert.from_hf(renamed(str, extra), tmp_path / 'ours')
  assert any(note.startswith('5 tensors are left out') for note in made.notes)
  assert verify(golden.FOLDER, tmp_path / 'ours').same


def test_both_at_once(renamed, tmp_path):
  extra = ('module.transformer.rotary_emb.inv_freq',)
  convert.from_hf(renamed(lambda n: f'module.{n}', extra), tmp_path / 'ours')
  assert verify(golden.FOLDER, tmp_path / 'ours').same


def test_what_is_no_constant_is_not_left_out(renamed, tmp_path):
  extra = ('transformer.h.0.attn.c_attn.scale',)
  with pytest.raises(CheckpointError, match='1 unknown: transformer.h.0.attn'):
    convert.from_hf(renamed(str, extra), tmp_path / 'ours')


def test_an_adapter_that_is_not_merged(renamed, tmp_path):
  extra = ('base_model.model.transformer.h.0.attn.c_attn.lora_A.weight',)
  folder = renamed(
    lambda n: 'base_model.model.' + n.replace('c_attn.', 'c_attn.base_layer.'),
    extra,
  )
  with pytest.raises(CheckpointError, match='PEFT: merge_and_unload'):
    convert.from_hf(folder, tmp_path / 'ours')


def test_names_by_config(renamed, tmp_path):
  folder = renamed(lambda n: f'llm/{n}', ['optimizer.step'])
  names = TensorNames(rename=(('^llm/', ''),), leave_out=(r'optimizer\..*',))
  made = convert.from_hf(folder, tmp_path / 'ours', names=names)
  assert '61 tensors are renamed' in made.notes[0]
  assert verify(golden.FOLDER, tmp_path / 'ours').same
  both = TensorNames(rename=(('.*', 'x'),))
  with pytest.raises(CheckpointError, match='two tensors would be called x'):
    convert.from_hf(folder, tmp_path / 'other', names=both)


@pytest.mark.parametrize(
  'arguments',
  [
    {'rename': (('(', ''),)},
    {'rename': (('a', r'\9'),)},
    {'rename': 'ab'},
    {'rename': ((1, 2),)},
    {'leave_out': ('[',)},
    {'leave_out': 5},
  ],
)
def test_rules_that_are_none(arguments):
  with pytest.raises(ConfigError, match='TensorNames: .*regular expression'):
    TensorNames(**arguments)


def test_a_prefix_of_openclips_names(tmp_path):
  tensors = load_file(OPENCLIP / 'open_clip_model.safetensors')
  save_file(
    {f'module.{name}': x for name, x in tensors.items()},
    tmp_path / 'open_clip_model.safetensors',
  )
  shutil.copy(OPENCLIP / openclip.CONFIG, tmp_path)
  config = openclip.read_config(OPENCLIP)
  wanted = openclip.open_vision(OPENCLIP, config)
  found = openclip.open_vision(tmp_path, config)
  assert found.keys() == wanted.keys()
  for name, tensor in wanted.items():
    np.testing.assert_array_equal(found[name].load(), tensor.load())


def test_packed_weights_under_other_names(tmp_path):
  int4 = golden.FOLDER.parent / 'int4'
  folder = tmp_path / 'renamed'
  shutil.copytree(int4, folder)
  tensors = load_file(int4 / 'model.safetensors')
  save_file(
    {f'llm/{name}': x for name, x in tensors.items()},
    folder / 'model.safetensors',
  )
  names = TensorNames(rename=(('^llm/', ''),))
  ours = tmp_path / 'ours'
  convert.from_hf(folder, ours, keep_int4=True, names=names)
  found = verify(int4, ours)
  assert found.same
  assert found.tensors == 69
