"""Runs that train low-rank factors: as PEFT trains them, saved alone."""

import dataclasses
import pathlib
import shutil

import fake
import golden
import grain
import jax
import lora_golden
import numpy as np
import pytest

import qwenvl_jax
from qwenvl_jax.conversion import (
  adapters,
  checkpoint_io,
  convert,
  low_rank,
  peft,
)
from qwenvl_jax.conversion.families.qwen_vl.assets import write_assets
from qwenvl_jax.conversion.low_rank import LowRank
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.model.lora import LoraConfig
from qwenvl_jax.sharding import make_mesh, put_batch
from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.init import InitFrom
from qwenvl_jax.train.loop import TrainConfig, train
from qwenvl_jax.train.objective import NextToken
from qwenvl_jax.train.optimizer import OptimizerConfig, flatten, unflatten
from qwenvl_jax.train.state import (
  abstract_params,
  abstract_state,
  create_state,
  random_params,
)
from qwenvl_jax.train.step import compile_step

WHOLE = {'chat': (), 'base': ('decoder/embed', 'decoder/lm_head/kernel')}


def place(values, target):
  return jax.tree.map(
    lambda x, t: jax.device_put(np.array(x), t.sharding), values, target
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', lora_golden.NAMES)
def test_the_same_twelve_steps_as_peft(name):
  steps = lora_golden.read(name, 'trajectory.json')
  config = OptimizerConfig(
    peak=steps['peak'],
    end=steps['end'],
    warmup=steps['warmup'],
    steps=steps['steps'],
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    trainable=('.*/lora_.', *WHOLE[name]),
  )
  adapter = lora_golden.adapter(name)
  objective = NextToken(golden.config().replace(lora=adapter.lora))
  mesh = make_mesh()
  target = abstract_params(objective, config, mesh)
  params = unflatten(flatten(golden.params()) | dict(adapter.values))
  state = create_state(place(params, target), config, mesh)
  step = compile_step(objective, config, 1, mesh, state)
  made = golden.train_batch()
  fields = [field.name for field in dataclasses.fields(made)]
  batch = put_batch({key: getattr(made, key) for key in fields}, mesh)
  metrics = []
  for _ in range(steps['steps']):
    state, m = step(state, batch)
    metrics.append(jax.device_get(m))
  for key, tolerance in (('loss', 2e-5), ('grad_norm', 1e-4)):
    got = [float(m[key]) for m in metrics]
    np.testing.assert_allclose(got, steps[key], rtol=tolerance, err_msg=key)
  trained = flatten(jax.device_get(state.trained))
  found = peft.tensors_of(
    LowRank(adapter.lora, adapter.base, trained, 'the run'), golden.config()
  )
  for key, norm in steps['final_norms'].items():
    key = key.replace('.modules_to_save.default', '').replace('.default', '')
    np.testing.assert_allclose(
      np.linalg.norm(np.float64(found[key])), norm, rtol=1e-5, err_msg=key
    )


LORA = LoraConfig(
  rank=2, alpha=4, dropout=0.25, targets=('decoder/.*', 'vision/.*/qkv')
)


def configuration(base, steps=4, **changes):
  values = {
    'objective': NextToken(fake.small_config(lora=LORA)),
    'data': fake.Rows(),
    'optimizer': OptimizerConfig(
      peak=0.05,
      end=0.01,
      warmup=1,
      steps=steps,
      trainable=('.*/lora_.', 'decoder/embed'),
    ),
    'init': InitFrom(params=base),
    'checkpoint': CheckpointConfig(every=2, keep=3),
  }
  return TrainConfig(**values | changes)


def save_model(folder, seed):
  """A model of random values, as a checkpoint folder of ours."""
  config = OptimizerConfig(peak=1, end=0, warmup=1, steps=2)
  objective = NextToken(fake.small_config())
  target = abstract_params(objective, config, make_mesh())
  golden.save_params(folder, random_params(objective, target, seed))
  write_assets(folder, objective.config)
  return folder


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp('base') / 'model', 0)


@pytest.fixture(scope='module')
def run(base, tmp_path_factory):
  """(folder, last state) of a run."""
  folder = tmp_path_factory.mktemp('run') / 'run'
  return folder, train(configuration(base), folder)


def test_what_is_frozen_has_no_state_and_is_not_saved(run):
  folder, state = run
  trained = flatten(state.trained)
  assert 'decoder/embed' in trained
  assert all('lora_' in path or path == 'decoder/embed' for path in trained)
  moments = {key.split('/', 2)[-1] for key in fake.keys(state.opt_state)}
  assert not moments & set(flatten(state.frozen))
  saved = low_rank.read_ours(folder)
  assert saved.values.keys() == trained.keys()
  for path, x in trained.items():
    np.testing.assert_array_equal(saved.values[path], x, err_msg=path)


def test_a_run_goes_on_where_it_was(run, base, tmp_path):
  _, whole = run
  train(configuration(base), tmp_path / 'run', stop_at=2)
  again = train(configuration(base), tmp_path / 'run')
  for path, x in flatten(whole.trained).items():
    np.testing.assert_array_equal(flatten(again.trained)[path], x, path)
  assert flatten(again.frozen).keys() == flatten(whole.frozen).keys()


@pytest.mark.parametrize('dropout', [0.0, 0.25])
def test_dropout_follows_from_the_seed_of_the_run(dropout, run, base, tmp_path):
  model = fake.small_config(lora=dataclasses.replace(LORA, dropout=dropout))
  config = configuration(
    base,
    objective=NextToken(model),
    init=InitFrom(params=base, adapted=run[0]),
  )
  found = []
  for seed in (0, 2**32 - 1):
    seeded = dataclasses.replace(config, seed=seed)
    state = train(seeded, tmp_path / str(seed), stop_at=1)
    found.append(flatten(state.trained))
  same = [np.array_equal(found[1][path], x) for path, x in found[0].items()]
  assert all(same) == (dropout == 0)


def test_a_run_does_not_go_on_with_another_base(run, tmp_path):
  folder, _ = run
  other = save_model(tmp_path / 'other', 1)
  with pytest.raises(CheckpointError, match='has other values'):
    train(configuration(other, steps=6), folder)


def test_a_run_goes_on_from_an_adapter_of_peft(run, base, tmp_path):
  folder, state = run
  adapters.to_peft(folder, tmp_path / 'peft')
  init = InitFrom(params=base, adapted=tmp_path / 'peft')
  mesh = make_mesh()
  config = configuration(base, init=init)
  target = abstract_params(config.objective, config.optimizer, mesh)
  from qwenvl_jax.train.init import initial_params

  found = flatten(initial_params(config.objective, target, init, 0))
  for path, x in flatten(state.trained).items():
    np.testing.assert_array_equal(found[path], x, path)


def test_a_run_opens_as_an_adapter_and_by_itself(run, base, tmp_path):
  folder, state = run
  tokens = fake.rows(0, 2)['tokens'][:, 6:]
  wanted = np.asarray(qwenvl_jax.load(base, adapter=folder).logits(tokens))
  plain = np.asarray(qwenvl_jax.load(base).logits(tokens))
  assert np.abs(wanted - plain).max() > 0.01
  np.testing.assert_array_equal(qwenvl_jax.load(folder).logits(tokens), wanted)
  adapters.merge(base, folder, tmp_path / 'merged')
  merged = qwenvl_jax.load(tmp_path / 'merged').logits(tokens)
  np.testing.assert_allclose(merged, wanted, atol=1e-4)


def test_a_run_whose_base_is_gone_says_so(base, run, tmp_path):
  shutil.copy(run[0] / 'lora.json', tmp_path)
  path = tmp_path / 'lora.json'
  path.write_text(path.read_text().replace(str(base), str(base / 'gone')))
  with pytest.raises(CheckpointError, match='gone, which is not there'):
    qwenvl_jax.load(tmp_path)


def test_factors_must_be_trained(base):
  config = configuration(base)
  optimizer = dataclasses.replace(config.optimizer, trainable=('adapter/.*',))
  mesh = make_mesh()
  with pytest.raises(ConfigError, match='must match all factors'):
    target = abstract_params(config.objective, optimizer, mesh)
    abstract_state(target, optimizer, mesh)


def test_a_base_is_needed(tmp_path):
  with pytest.raises(ConfigError, match='InitFrom.params'):
    train(configuration(None), tmp_path / 'run')


@dataclasses.dataclass(frozen=True)
class GoldenRows:
  """The golden batch; one row after the other is not learned."""

  batch_size: int = 2

  def iterator(self, process_index=0, process_count=1):
    made = golden.train_batch()
    fields = [field.name for field in dataclasses.fields(made)]
    rows = {x: getattr(made, x)[: self.batch_size] for x in fields}

    def batch(index):
      weights = np.array(rows['loss_weights'])
      weights[index % self.batch_size] = 0
      return rows | {'loss_weights': weights}

    dataset = grain.MapDataset.range(1_000_000).map(batch)
    return iter(dataset.to_iter_dataset())


@pytest.mark.slow
def test_from_the_int4_release_to_a_release_of_ones_own(tmp_path):
  """Q-LoRA: trained, gone on with, opened, merged, in the released layout."""
  kept = tmp_path / 'kept'
  convert.from_hf(golden.FOLDER.parent / 'int4', kept, keep_int4=True)
  model = checkpoint_io.read_config(kept, keep_int4=True)
  assert model.decoder.int4_group == 128
  model = model.replace(dtype='float32', remat='none', lora=LORA)
  config = configuration(
    kept,
    objective=NextToken(model),
    data=GoldenRows(),
    optimizer=OptimizerConfig(
      peak=0.02, end=0.01, warmup=1, steps=4, trainable=('.*/lora_.',)
    ),
  )
  run = tmp_path / 'run'
  whole = flatten(train(config, run).trained)
  train(config, tmp_path / 'again', stop_at=2)
  again = flatten(train(config, tmp_path / 'again').trained)
  for path, x in whole.items():
    np.testing.assert_array_equal(again[path], x, err_msg=path)

  ids = golden.expected()['eval/text/ids']
  adapted = qwenvl_jax.load(kept, adapter=run, dtype='float32')
  assert adapted.config.decoder.int4_group == 128
  wanted = np.asarray(adapted.logits(ids))
  plain = qwenvl_jax.load(kept, dtype='float32').logits(ids)
  assert np.abs(wanted - plain).max() > 0.1
  adapters.merge(kept, run, tmp_path / 'merged', 'float32')
  convert.to_hf(tmp_path / 'merged', tmp_path / 'released')
  released = qwenvl_jax.load(tmp_path / 'released', dtype='float32')
  assert released.config.decoder.int4_group is None
  np.testing.assert_allclose(released.logits(ids), wanted, atol=golden.ATOL)


MESHES = """
import os, sys
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
sys.path.insert(0, {here!r})
import dataclasses, jax, numpy as np, fake
from qwenvl_jax.model.lora import LoraConfig
from qwenvl_jax.sharding import MeshConfig, make_mesh, put_batch
from qwenvl_jax.train import objective, optimizer, state, step

def run(mesh, group):
  small = fake.small_config()
  model = objective.NextToken(fake.small_config(
    decoder=dataclasses.replace(small.decoder, int4_group=group),
    lora=LoraConfig(
      rank=4, alpha=4, dropout=0.25, targets=('decoder/.*', 'vision/.*')
    ),
  ))
  config = optimizer.OptimizerConfig(
    1e-2, 1e-3, 1, 10, trainable=('.*/lora_.',)
  )
  target = state.abstract_params(model, config, mesh)
  rng = np.random.default_rng(0)
  def draw(path, t):
    if t.dtype == np.int32:
      x = rng.integers(-2**31, 2**31, t.shape, np.int32)
    else:
      x = rng.normal(0, 0.02 if path[-1].key == 'scales' else 0.2, t.shape)
    return jax.device_put(x.astype(t.dtype), t.sharding)
  params = jax.tree_util.tree_map_with_path(draw, target)
  s = state.create_state(params, config, mesh)
  f = step.compile_step(model, config, 2, mesh, s)
  found = []
  for k in range(2):
    s, m = f(s, put_batch(fake.rows(k, 16), mesh))
    found.append((float(m['loss']), float(m['grad_norm'])))
  if mesh.size > 1:
    places = [x.sharding for x in jax.tree.leaves(s.trained)]
    whole = [place.is_fully_replicated for place in places]
    assert sum(whole) < len(whole) / 2
  return np.array(found), jax.device_get(s.trained)

for group, sizes in ((None, (2, 2, 2, 1)), (8, (1, 4, 2, 2))):
  alone, wanted = run(make_mesh(MeshConfig(), jax.devices()[:1]), group)
  metrics, trained = run(make_mesh(MeshConfig(*sizes)), group)
  np.testing.assert_allclose(metrics, alone, rtol=1e-4)
  for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(wanted)):
    np.testing.assert_allclose(x, y, atol=2e-4)
"""


@pytest.mark.slow
def test_factors_on_any_mesh_beside_plain_and_packed_kernels(run_on_devices):
  here = str(pathlib.Path(__file__).parent)
  run_on_devices(8, MESHES.format(here=here))
