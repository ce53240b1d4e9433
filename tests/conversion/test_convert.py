"""Whole folders: there and back, stage 1's start, and what is refused."""

import gc
import json
import shutil
import sys
from pathlib import Path

import golden
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax.conversion import checkpoint_io, convert, layout
from qwenvl_jax.conversion.blocks import plan
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.reader import open_released
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import CheckpointError

OPENCLIP = Path(__file__).parents[1] / 'goldens' / 'openclip'


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
  """The golden checkpoint, converted."""
  folder = tmp_path_factory.mktemp('converted') / 'ours'
  convert.from_hf(golden.FOLDER, folder)
  return folder


@pytest.fixture
def released(tmp_path):
  """A copy of the golden to damage: (its folder, its tensors, write)."""
  tensors = load_file(golden.FOLDER / 'model.safetensors')
  folder = tmp_path / 'released'
  folder.mkdir()
  shutil.copy(golden.FOLDER / 'config.json', folder)

  def write(changes):
    for name, value in changes.items():
      tensors.pop(name, None)
      if value is not None:
        tensors[name] = value
    save_file(tensors, folder / 'model.safetensors')
    return folder

  return tensors, write


def test_there_and_back_is_bit_exact(ours, tmp_path):
  back = tmp_path / 'back'
  convert.to_hf(ours, back, shard_bytes=1_000_000)
  first, second = open_released(golden.FOLDER), open_released(back)
  assert first.keys() == second.keys()
  for name, tensor in first.items():
    assert tensor.dtype == second[name].dtype
    assert tensor.load().tobytes() == second[name].load().tobytes(), name
  assert checkpoint_io.read_config(back) == checkpoint_io.read_config(
    golden.FOLDER
  )
  sizes = [path.stat().st_size for path in back.glob('*.safetensors')]
  assert len(sizes) > 3 and max(sizes) < 1_020_000
  index = json.loads((back / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == 4_309_344
  # Others' readers agree on what was written.
  for path in back.glob('*.safetensors'):
    for name, value in load_file(path).items():
      assert value.tobytes() == first[name].load().tobytes()


def test_blocks_of_any_size_convert_alike(ours, tmp_path, monkeypatch):
  """Many chunks an array, as at full size."""
  monkeypatch.setattr('qwenvl_jax.conversion.convert.plan', small_plan)
  convert.from_hf(golden.FOLDER, tmp_path / 'ours')
  chunks = list((tmp_path / 'ours/params/decoder.embed').glob('[0-9]*'))
  assert len(chunks) > 4
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back')
  first = load_file(golden.FOLDER / 'model.safetensors')
  second = load_file(tmp_path / 'back' / 'model.safetensors')
  for name, value in first.items():
    assert value.tobytes() == second[name].tobytes(), name


def small_plan(table):
  return plan(table, 30_000)


def test_a_training_run_converts(tmp_path):
  """Its newest step, packed as Orbax packs what is in memory."""
  run = tmp_path / 'run'
  params = checkpoint_io.read_params(golden.FOLDER, golden.config())
  assets.write_assets(run, golden.config())
  golden.save_params(run / 'checkpoints' / '7', params)
  (run / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir()
  for source, target in ((run, 'a'), (run / 'checkpoints' / '7', 'b')):
    convert.to_hf(source, tmp_path / target)
    assert verify(golden.FOLDER, tmp_path / target).same


def test_plain_orbax_opens_it(ours):
  restored = ocp.StandardCheckpointer().restore(ours / 'params')
  wanted = dict(layout.flatten(golden.params()))
  for path, value in layout.flatten(restored):
    np.testing.assert_array_equal(value.astype(np.float32), wanted[path])
  assert len(dict(layout.flatten(restored))) == len(wanted)


def test_restores_sharded(ours, run_on_devices):
  """Onto a mesh, from both layouts: each device holds its part."""
  run_on_devices(
    8,
    f"""
import jax, numpy as np
import qwenvl_jax
from qwenvl_jax.conversion import layout
from qwenvl_jax.sharding import MeshConfig, make_mesh, use_mesh
whole = dict(layout.flatten(qwenvl_jax.load({str(golden.FOLDER)!r}).params))
with use_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
  for folder in ({str(golden.FOLDER)!r}, {str(ours)!r}):
    handle = qwenvl_jax.load(folder)
    for path, value in layout.flatten(handle.params):
      np.testing.assert_array_equal(value, whole[path])
    up = handle.params['decoder']['blocks_1']['mlp']['up']['kernel']
    assert up.shape == (352, 256), up.shape
    assert {{s.data.shape for s in up.addressable_shards}} == {{(44, 256)}}
    q = handle.params['vision']['blocks']['attn']['q']['kernel']
    assert q.addressable_shards[0].data.size * 8 == q.size
""",
  )


def test_settings_and_files_travel(released, tmp_path):
  _, write = released
  folder = write({})
  raw = json.loads((folder / 'config.json').read_text()) | {'fp16': False}
  (folder / 'config.json').write_text(json.dumps(raw))
  texts = {
    'generation_config.json': '{"top_p": 0.5}',
    'qwen.tiktoken': golden.vocabulary(),
    'modeling_qwen.py': 'released = True\n',
    'LICENSE': 'terms\n',
  }
  for name, text in texts.items():
    (folder / name).write_text(text)
  convert.from_hf(folder, tmp_path / 'ours')
  convert.to_hf(tmp_path / 'ours', tmp_path / 'back', dtype='float32')
  for name, text in texts.items():
    assert (tmp_path / 'back' / name).read_text() == text
  back = json.loads((tmp_path / 'back' / 'config.json').read_text())
  assert back['fp16'] is False
  assert back['torch_dtype'] == 'float32'


def test_init_stage1(tmp_path):
  out = tmp_path / 'start'
  made = convert.init_stage1(OPENCLIP, golden.FOLDER, out, seed=3)
  assert made.new_rows == 0
  config = checkpoint_io.read_config(out)
  params = checkpoint_io.read_params(out, config)
  checkpoint_io.check_against(config, params, 'start')
  vision = checkpoint_io.read_params(OPENCLIP, config)['vision']
  for path, value in layout.flatten(vision):
    stored = dict(layout.flatten(params['vision']))[path]
    np.testing.assert_array_equal(stored, value)
  decoder = golden.params()['decoder']['embed']
  np.testing.assert_array_equal(
    np.asarray(params['decoder']['embed'], np.float32), decoder
  )
  again = tmp_path / 'again'
  convert.init_stage1(OPENCLIP, golden.FOLDER, again, seed=3)
  same = jax.tree.map(
    lambda a, b: np.array_equal(a, b),
    params['adapter'],
    checkpoint_io.read_params(again, config)['adapter'],
  )
  assert all(jax.tree.leaves(same))


def test_init_stage1_grows_the_vocabulary(released, tmp_path):
  """A decoder whose vocabulary ends before the image tokens gets new rows."""
  tensors, write = released
  text = {n: x for n, x in tensors.items() if 'visual' not in n}
  visual = dict.fromkeys(tensors.keys() - text.keys())
  names = ('transformer.wte.weight', 'lm_head.weight')
  folder = write(visual | {n: tensors[n][:490].copy() for n in names})
  raw = json.loads((folder / 'config.json').read_text()) | {'vocab_size': 490}
  (folder / 'config.json').write_text(json.dumps(raw))
  (folder / 'modeling_qwen.py').write_text('')
  (folder / 'qwen.tiktoken').write_text(golden.vocabulary())
  out = tmp_path / 'start'
  made = convert.init_stage1(OPENCLIP, folder, out, dtype='float32')
  # Qwen-7B's vocabulary serves a Qwen-VL, its code does not.
  assert (out / 'qwen.tiktoken').exists()
  assert not (out / 'modeling_qwen.py').exists()
  assert (made.new_rows, made.config.decoder.vocab_size) == (22, 512)
  params = checkpoint_io.read_params(out, checkpoint_io.read_config(out))[
    'decoder'
  ]
  wanted = golden.params()['decoder']
  np.testing.assert_array_equal(params['embed'][:490], wanted['embed'][:490])
  head, stored = params['lm_head']['kernel'], wanted['lm_head']['kernel']
  np.testing.assert_array_equal(head[:, :490], stored[:, :490])
  for new in (params['embed'][490:], head[:, 490:]):
    assert 0.015 < np.std(new) < 0.025
  assert convert.vocabulary_size(golden.config()) == 512


PROJ = 'transformer.visual.proj'
LN_F = 'transformer.ln_f.weight'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({LN_F: None}, f'1 missing: {LN_F}'),
    ({'extra': np.zeros(1, np.float32)}, '1 unknown: extra'),
    ({PROJ: np.zeros((2, 2), np.float32)}, r'proj is \[2, 2\], not \[256, 256'),
    ({LN_F: np.zeros(256, np.int32)}, f'tensor {LN_F} has dtype int32'),
    ({LN_F: np.zeros(256)}, f'tensor {LN_F} has dtype float64'),
    (
      {'transformer.h.1.ln_1.weight': np.zeros(256, np.float32)},
      'h.1.ln_1.weight is float32, but transformer.h.0.ln_1.weight is bfloat16',
    ),
  ],
)
def test_tensors_that_do_not_fit(released, tmp_path, changes, message):
  _, write = released
  folder = write(changes)
  with pytest.raises(CheckpointError, match=message) as error:
    convert.from_hf(folder, tmp_path / 'ours')
  assert str(folder) in str(error.value)
  assert not (tmp_path / 'ours').exists()


def test_mixed_dtypes_become_one(released, tmp_path):
  _, write = released
  name = 'transformer.h.1.ln_1.weight'
  folder = write({name: np.full(256, 1.5, np.float32)})
  convert.from_hf(folder, tmp_path / 'ours', dtype='bfloat16')
  params = checkpoint_io.read_params(tmp_path / 'ours', golden.config())
  scale = params['decoder']['blocks']['ln_1']['scale']
  assert scale.dtype == 'bfloat16'
  assert (np.asarray(scale[1], np.float32) == 1.5).all()


@pytest.mark.parametrize(
  ('names', 'family'),
  [
    (('model.layers.0.self_attn.q_proj.weight',), 'Llama'),
    (('visual.blocks.0.attn.qkv.weight', 'model.layers.0.x'), 'Qwen2-VL'),
    (('h.0.attn.c_attn.weight',), 'GPT-2'),
  ],
)
def test_tensors_of_another_family(released, tmp_path, names, family):
  tensors, write = released
  changes = dict.fromkeys(tensors) | dict.fromkeys(names, np.zeros(1))
  folder = write(changes)
  with pytest.raises(CheckpointError, match=f'looks like {family}'):
    convert.from_hf(folder, tmp_path / 'ours')


def test_qwen7b_alone_is_no_qwen_vl(released, tmp_path):
  tensors, write = released
  folder = write(dict.fromkeys(n for n in tensors if 'visual' in n))
  with pytest.raises(CheckpointError, match='no vision and no adapter.*init'):
    convert.from_hf(folder, tmp_path / 'ours')


def test_float16_that_overflows(released, tmp_path):
  tensors, write = released
  folder = write({LN_F: np.full(256, 1e5, ml_dtypes.bfloat16)})
  message = f'{LN_F} has values beyond float16'
  with pytest.raises(CheckpointError, match=message):
    convert.from_hf(folder, tmp_path / 'half', dtype='float16')
  convert.from_hf(folder, tmp_path / 'ours')
  with pytest.raises(CheckpointError, match=message):
    convert.to_hf(tmp_path / 'ours', tmp_path / 'half', dtype='float16')
  assert not (tmp_path / 'half').exists()
  assert not (tmp_path / 'half.partial').exists()


@pytest.mark.parametrize('damage', ['missing', 'truncated'])
def test_damaged_orbax_parameters(ours, tmp_path, damage, monkeypatch):
  complaints = []
  monkeypatch.setattr(sys, 'unraisablehook', complaints.append)
  folder = tmp_path / 'damaged'
  shutil.copytree(ours, folder)
  chunk = folder / 'params' / 'decoder.blocks.mlp.up.kernel' / '0.0.0'
  if damage == 'missing':
    chunk.unlink()
  else:
    chunk.write_bytes(chunk.read_bytes()[:1000])
  with pytest.raises(CheckpointError, match='damaged/params cannot be'):
    checkpoint_io.read_params(folder, golden.config())
  with pytest.raises(CheckpointError, match='mlp/up/kernel cannot be read'):
    convert.to_hf(folder, tmp_path / 'back')
  assert not (tmp_path / 'back').exists()
  # The other arrays, whose reading was given up.
  gc.collect()
  assert not complaints


def test_progress_counts_bytes(tmp_path):
  told = []
  convert.from_hf(
    golden.FOLDER, tmp_path / 'ours', progress=lambda *x: told.append(x)
  )
  assert told[0] == (0, 4_309_344)
  assert told[-1] == (4_309_344, 4_309_344)
  assert told == sorted(told)


def test_parameters_that_are_no_floats(tmp_path):
  params = golden.params()
  decoder = params['decoder'] | {'ln_f': {'scale': np.ones(256, np.int32)}}
  golden.save_params(tmp_path, params | {'decoder': decoder})
  assets.write_assets(tmp_path, golden.config())
  with pytest.raises(CheckpointError, match='ln_f/scale has dtype int32'):
    convert.to_hf(tmp_path, tmp_path / 'back')
