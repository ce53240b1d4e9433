"""Parameters with layers apart, straight from every kind of folder."""

from pathlib import Path

import golden
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import qwenvl_jax
from qwenvl_jax.conversion import checkpoint_io, convert, layout, loader
from qwenvl_jax.conversion.blocks import plan
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.tensors import Tensor
from qwenvl_jax.model.stacking import unstack_layers

INT4 = Path(__file__).parents[1] / 'goldens' / 'int4'


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
  """Name to (folder, whether int4 weights are kept)."""
  root = tmp_path_factory.mktemp('kinds')
  convert.from_hf(golden.FOLDER, root / 'converted')
  convert.from_hf(INT4, root / 'int4', keep_int4=True)
  params = checkpoint_io.read_params(golden.FOLDER, golden.config())
  assets.write_assets(root / 'run', golden.config())
  golden.save_params(root / 'run' / 'checkpoints' / '7', params)
  return {
    'released': (golden.FOLDER, False),
    'converted': (root / 'converted', False),
    'run': (root / 'run', False),
    'int4': (INT4, True),
    'int4 converted': (root / 'int4', True),
    'int4 dequantized': (INT4, False),
  }


KINDS = (
  'released',
  'converted',
  'run',
  'int4',
  'int4 converted',
  'int4 dequantized',
)


def same(found, wanted):
  found, wanted = (dict(layout.flatten(tree)) for tree in (found, wanted))
  assert found.keys() == wanted.keys()
  for path, value in wanted.items():
    assert found[path].dtype == value.dtype, path
    assert found[path].shape == value.shape, path
    assert np.asarray(found[path]).tobytes() == np.asarray(value).tobytes()


@pytest.mark.parametrize('limit', [2_000, None])
@pytest.mark.parametrize('dtype', [None, 'float32'])
@pytest.mark.parametrize('kind', KINDS)
def test_apart_is_what_stacked_is(kinds, kind, dtype, limit, monkeypatch):
  folder, keep_int4 = kinds[kind]
  config = checkpoint_io.read_config(folder, keep_int4)
  wanted = unstack_layers(checkpoint_io.read_params(folder, config, dtype))
  if limit:
    # Arrays of many blocks, as at full size.
    monkeypatch.setattr(checkpoint_io, 'plan', lambda table: plan(table, limit))
  apart = config.replace(scan_layers=False)
  params = checkpoint_io.read_params(folder, apart, dtype)
  same(params, wanted)
  checkpoint_io.check_against(apart, params, str(folder))


def test_torch_files(tmp_path):
  torch = pytest.importorskip('torch')
  state = {
    name: torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    for name, values in load_file(golden.FOLDER / 'model.safetensors').items()
  }
  torch.save(state, tmp_path / 'pytorch_model.bin')
  (tmp_path / 'config.json').write_bytes(
    (golden.FOLDER / 'config.json').read_bytes()
  )
  same(qwenvl_jax.load(tmp_path).params, qwenvl_jax.load(golden.FOLDER).params)


def test_a_folder_beside_this_one(kinds, monkeypatch):
  folder, _ = kinds['converted']
  monkeypatch.chdir(kinds['run'][0])
  params = qwenvl_jax.load(Path('..', folder.name)).params
  same(params, qwenvl_jax.load(folder).params)


def test_a_part_alone(kinds):
  folder, _ = kinds['converted']
  config = golden.config().replace(scan_layers=False)
  kept = 'decoder/blocks_1/mlp/up/kernel'
  params = checkpoint_io.read_params(
    folder, config, keep=lambda path: path == kept
  )
  assert list(dict(layout.flatten(params))) == [kept]


def test_on_a_mesh(kinds, run_on_devices):
  run_on_devices(
    8,
    f"""
from pathlib import Path
import jax, numpy as np
import qwenvl_jax
from qwenvl_jax.conversion import layout
from qwenvl_jax.sharding import MeshConfig, make_mesh, use_mesh
for folder, keep in {[(str(f), k) for f, k in kinds.values()]!r}:
  whole = dict(layout.flatten(qwenvl_jax.load(folder, keep_int4=keep).params))
  for sizes in ({{'fsdp': 4, 'tensor': 2}}, {{'data': 4, 'tensor': 2}}):
    with use_mesh(make_mesh(MeshConfig(**sizes))):
      params = qwenvl_jax.load(folder, keep_int4=keep).params
    split = set()
    for path, value in layout.flatten(params):
      np.testing.assert_array_equal(value, whole[path])
      assert len(value.sharding.device_set) == 8
      if not value.sharding.is_fully_replicated:
        split.add(path)
    assert any('blocks_1/mlp/up' in path for path in split)
""",
  )


def test_values_are_read_to_where_jax_has_them():
  """A second copy would not fit where a checkpoint fills the memory."""
  config = golden.config().replace(scan_layers=False)
  table = layout.rules(config)
  filled = []

  def read_into(start, rows):
    del start
    filled.append(rows)
    rows[...] = 3

  dtype = np.dtype(ml_dtypes.bfloat16)
  shapes = layout.parameter_shapes(config)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  arrays = loader.to_devices(
    {
      name: Tensor(shape, dtype, Path('memory'), read_into)
      for name, shape in layout.released_shapes(table).items()
    },
    plan(table, 10_000),
    shapes,
    dict.fromkeys(shapes, device),
    outputs_first=True,
  )
  places = {
    (x.unsafe_buffer_pointer(), x.unsafe_buffer_pointer() + x.nbytes)
    for path, x in arrays.items()
    if path.startswith('decoder/')
  }
  inside = sum(
    rows.nbytes
    for rows in filled
    if any(a <= rows.ctypes.data < b for a, b in places)
  )
  assert inside == sum(b - a for a, b in places)
  for value in arrays.values():
    assert (np.asarray(value) == 3).all()
