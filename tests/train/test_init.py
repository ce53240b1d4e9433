import dataclasses
import functools

import fake
import golden
import jax
import numpy as np
import pytest

from qwenvl_jax.conversion import convert, layout
from qwenvl_jax.conversion.checkpoint_io import (
  dequantized,
  read_config,
  read_params,
)
from qwenvl_jax.conversion.families import openclip
from qwenvl_jax.conversion.families.qwen_vl.assets import write_assets
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.init import InitFrom, initial_params
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import OptimizerConfig, flatten, unflatten
from qwenvl_jax.train.state import (
  abstract_params,
  abstract_state,
  random_params,
)

MODEL = NextToken(fake.small_config(dtype='bfloat16'))


def target(model=MODEL, **changes):
  config = OptimizerConfig(
    peak=1.0, end=0.1, warmup=0, steps=9, trainable=('adapter/.*',), **changes
  )
  return abstract_params(model, config, make_mesh())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A checkpoint folder, and the float32 parameters in it."""
  path = tmp_path_factory.mktemp('checkpoint')
  everything = OptimizerConfig(peak=1.0, end=0.1, warmup=0, steps=9)
  full = abstract_params(MODEL, everything, make_mesh())
  params = random_params(MODEL, full, 7)
  write_assets(path, MODEL.config)
  golden.save_params(path, params)
  return path, jax.device_get(params)


def same(a, b):
  a, b = flatten(jax.device_get(a)), flatten(b)
  assert a.keys() == b.keys()
  for path, value in a.items():
    np.testing.assert_array_equal(value, b[path].astype(value.dtype))


def test_a_stage_starts_from_a_bucket(folder, bucket):
  path, params = folder
  bucket.put_folder(path, 'start')
  init = InitFrom(params=f'{bucket.url}/start')
  same(initial_params(MODEL, target(), init, seed=0), params)


def test_packed_kernels_are_not_trained(tmp_path):
  int4 = golden.FOLDER.parent / 'int4'
  convert.from_hf(int4, tmp_path / 'kept', keep_int4=True)
  model = NextToken(read_config(tmp_path / 'kept'))
  everything = OptimizerConfig(peak=1.0, end=0.1, warmup=0, steps=9)
  mesh = make_mesh()
  wanted = abstract_params(model, everything, mesh)
  with pytest.raises(ConfigError, match=r'kernel/words is int32: .*int4_group'):
    abstract_state(wanted, everything, mesh)
  init = InitFrom(params=str(tmp_path / 'kept'))
  plain = NextToken(dequantized(model.config))
  with pytest.raises(CheckpointError, match='keeps int4 .*without --keep_int4'):
    initial_params(
      plain, abstract_params(plain, everything, mesh), init, seed=0
    )
  with pytest.raises(CheckpointError, match='tiny holds no int4 .*lora.gin'):
    initial_params(model, wanted, InitFrom(params=golden.FOLDER), seed=0)
  # Low-rank factors are trained beside them, as they are stored.
  kept = flatten(initial_params(model, wanted, init, seed=0))
  stored = read_params(tmp_path / 'kept', model.config)
  for path, x in layout.flatten(stored):
    if layout.is_packed(path):
      assert kept[path].dtype == x.dtype
      np.testing.assert_array_equal(kept[path], x, err_msg=path)


def test_random_parts_depend_on_the_seed(folder):
  path, _ = folder
  init = InitFrom(params=str(path), adapter=None)
  a = initial_params(MODEL, target(), init, seed=0)
  b = initial_params(MODEL, target(), init, seed=1)
  same(a, jax.device_get(b))
  fresh = InitFrom(vision=str(path), decoder=str(path))
  a = flatten(initial_params(MODEL, target(), fresh, seed=0)['adapter'])
  b = flatten(initial_params(MODEL, target(), fresh, seed=1)['adapter'])
  assert (np.asarray(a['query']) != np.asarray(b['query'])).any()
  np.testing.assert_array_equal(a['pos_embed'], b['pos_embed'])


def test_everything_from_the_stage_before(folder):
  path, params = folder
  wanted = target()
  got = initial_params(MODEL, wanted, InitFrom(params=str(path)), seed=0)
  same(got, params)
  # Frozen: the dtype of the computation; trained: the master copy's.
  assert got['decoder']['embed'].dtype == 'bfloat16'
  assert got['adapter']['query'].dtype == 'float32'
  assert got['adapter']['pos_embed'].dtype == 'float32'
  assert got['adapter']['query'].sharding == wanted['adapter']['query'].sharding


def test_parts_from_folders_of_their_own(folder):
  path, params = folder
  init = InitFrom(vision=str(path), decoder=str(path))
  got = initial_params(MODEL, target(), init, seed=3)
  same(got['vision'], params['vision'])
  same(got['decoder'], params['decoder'])
  assert (
    np.asarray(got['adapter']['query']) != params['adapter']['query']
  ).any()


def test_a_folder_without_the_part_is_named(folder, tmp_path):
  _, params = folder
  write_assets(tmp_path, MODEL.config)
  golden.save_params(tmp_path, {'vision': params['vision']})
  with pytest.raises(CheckpointError) as error:
    initial_params(MODEL, target(), InitFrom(decoder=str(tmp_path)), seed=0)
  assert str(tmp_path) in str(error.value)
  assert 'lacks' in str(error.value) and 'decoder/blocks' in str(error.value)


def test_another_size_names_the_keys(folder):
  path, _ = folder
  config = MODEL.config
  wider = NextToken(
    config.replace(decoder=dataclasses.replace(config.decoder, vocab_size=40))
  )
  with pytest.raises(CheckpointError, match=r'decoder/embed is \[32, 16\]'):
    initial_params(wider, target(wider), InitFrom(params=str(path)), seed=0)


def test_a_folder_that_is_not_there_is_named(tmp_path):
  with pytest.raises(CheckpointError, match='nowhere'):
    init = InitFrom(params=str(tmp_path / 'nowhere'))
    initial_params(MODEL, target(), init, seed=0)


def test_parts_from_converted_and_released_folders(tmp_path):
  """Sharded as the target is, in its dtype: OpenCLIP, a converted Qwen-VL."""
  vision, released = golden.FOLDER.parent / 'openclip', golden.FOLDER
  convert.from_hf(released, tmp_path / 'ours')
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  config = golden.config().replace(vision=openclip.read_config(vision))
  shapes = layout.parameter_shapes(config)
  leaf = functools.partial(
    jax.ShapeDtypeStruct, dtype=np.float32, sharding=sharding
  )
  wanted = unflatten({path: leaf(shape) for path, shape in shapes.items()})
  init = InitFrom(
    vision=str(vision),
    decoder=str(tmp_path / 'ours'),
    adapter=str(golden.FOLDER),
  )
  params = initial_params(NextToken(config), wanted, init, seed=0)
  expected = golden.params()
  same(params['decoder'], expected['decoder'])
  same(params['adapter'], expected['adapter'])
  assert params['vision']['pos_embed'].dtype == np.float32
