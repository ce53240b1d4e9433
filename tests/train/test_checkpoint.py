import collections
import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys

import fake
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from qwenvl_jax.conversion.orbax_store import open_stores
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train import manifest
from qwenvl_jax.train.checkpoint import (
  CheckpointConfig,
  Checkpoints,
  save_args,
)
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.state import abstract_params, abstract_state

KILLER = pathlib.Path(__file__).with_name('killer.py')


def run_and_end(workdir, signum, *seconds):
  """(exit statuses, last state, stderr) of a run that is ended repeatedly."""
  result = workdir.with_suffix('.npz')
  done = subprocess.run(
    [sys.executable, KILLER, workdir, result, str(signum), *map(str, seconds)],
    env=os.environ | {'PYTHONPATH': str(KILLER.parents[2])},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert not done.returncode, done.stderr
  with np.load(result) as state:
    return json.loads(done.stdout), dict(state), done.stderr


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  statuses, state, _ = run_and_end(folder / 'run', 9)
  assert statuses == [0]
  return state


def same(a, b):
  assert a.keys() == b.keys()
  for name, value in a.items():
    np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bit_identical(tmp_path, undisturbed):
  seed = int.from_bytes(os.urandom(4))
  print('seed', seed)  # Shown if this fails.
  moments = [random.Random(seed).uniform(0, 0.5) for _ in range(5)]
  statuses, state, _ = run_and_end(tmp_path / 'run', 9, *moments)
  assert statuses == [-9] * 5 + [0]
  same(state, undisturbed)
  lines = (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == list(range(1, 61))


@pytest.mark.slow
def test_sigterm_saves_first(tmp_path, undisturbed):
  statuses, state, said = run_and_end(tmp_path / 'run', 15, 0.3, 0.1)
  assert statuses == [143, 143, 0]
  same(state, undisturbed)
  stops = [x for x in said.splitlines() if x.startswith('stopped by SIGTERM')]
  resumed = [x for x in said.splitlines() if x.startswith('resumed from step')]
  # Goes on from the very step it stopped at, whatever the interval.
  assert [x.split()[5].strip(',') for x in stops] == [
    x.split()[3] for x in resumed
  ]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run's folder with steps 2 and 4, and its last state."""
  folder = tmp_path_factory.mktemp('finished') / 'run'
  return folder, train(configuration(), folder)


def configuration(**changes):
  return fake.line_run(
    steps=4, checkpoint=CheckpointConfig(every=2, keep=3), **changes
  )


def largest(folder):
  return max(
    (p for p in folder.rglob('*') if p.is_file()),
    key=lambda p: p.stat().st_size,
  )


def remove(folder):
  largest(folder / 'params' / 'd').unlink()


def truncate(folder):
  file = largest(folder / 'optimizer' / 'd')
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def no_data(folder):
  shutil.rmtree(folder / 'data')


@pytest.mark.parametrize('harm', [remove, truncate, no_data])
def test_a_damaged_newest_step_is_named_and_the_one_before_used(
  harm, finished, tmp_path, capsys
):
  source, wanted = finished
  folder = tmp_path / 'run'
  shutil.copytree(source, folder)
  harm(folder / 'checkpoints' / '4')
  state = train(configuration(), folder)
  said = capsys.readouterr()
  assert f'{folder}/checkpoints/4 is damaged' in said.out
  assert 'going on from step 2' in said.out
  assert 'Traceback' not in said.err
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted)):
    np.testing.assert_array_equal(a, b)
  # Step 4 has been made again; what was there is kept aside.
  assert (folder / 'checkpoints' / '4' / 'params').is_dir()
  assert (folder / 'checkpoints-damaged' / '4').is_dir()


def test_values_that_changed_on_disk_are_noticed(finished, tmp_path, capsys):
  source, wanted = finished
  folder = tmp_path / 'run'
  shutil.copytree(source, folder)
  params = jax.device_get(wanted.params)
  params['model']['kernel'] = np.nextafter(params['model']['kernel'], 9.0)
  # As whole as any other checkpoint, but with other values.
  (folder / 'checkpoints' / '4' / manifest.FILE).unlink()
  with ocp.PyTreeCheckpointer() as checkpointer:
    place = folder / 'checkpoints' / '4' / 'params'
    checkpointer.save(place, params, force=True)
  train(configuration(), folder)
  said = capsys.readouterr().out
  assert 'contents changed on disk: trained/model/kernel' in said


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_never_passes_for_the_checkpoint(
  finished, tmp_path
):
  """Without the manifest, which would notice each."""
  source, _ = finished
  config, mesh = configuration(), make_mesh()
  target = abstract_params(config.objective, config.optimizer, mesh)
  target = abstract_state(target, config.optimizer, mesh)

  def restored(folder):
    checkpoints = Checkpoints(folder, config.checkpoint)
    with contextlib.closing(checkpoints):
      iterator = config.data.iterator()
      state = checkpoints.restore(target, iterator, lambda said: None)
    return [np.asarray(x) for x in jax.tree.leaves(state)]

  steps = {}
  for step in ('2', '4'):
    shutil.copytree(source, tmp_path / step)
    for other in {'2', '4'} - {step}:
      shutil.rmtree(tmp_path / step / 'checkpoints' / other)
    steps[step] = restored(tmp_path / step)
  seed = int.from_bytes(os.urandom(4))
  print('seed', seed)
  rng = random.Random(seed)
  found = collections.Counter()
  newest = source / 'checkpoints' / '4'
  for file in sorted(p for p in newest.rglob('*') if p.is_file()):
    name = file.relative_to(source)
    if file.name == manifest.FILE or 'data' in name.parts:
      continue
    folder = tmp_path / 'run'
    shutil.copytree(source, folder)
    (folder / 'checkpoints' / '4' / manifest.FILE).unlink()
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    (folder / name).write_bytes(content)
    try:
      state = restored(folder)
    except CheckpointError as error:  # Metadata that read like another run's.
      assert 'saved by a run with another model' in str(error)
      found['refused'] += 1
    else:
      (same,) = [
        step
        for step, leaves in steps.items()
        if all(np.array_equal(a, b) for a, b in zip(state, leaves))
      ]
      found[same] += 1
    shutil.rmtree(folder)
  assert found['2'] >= 3, found


def test_with_no_good_step_nothing_is_touched(finished, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(finished[0], folder)
  for step in ('2', '4'):
    remove(folder / 'checkpoints' / step)
  with pytest.raises(CheckpointError, match='step 4: .*step 2: ') as error:
    train(configuration(), folder)
  assert 'another --workdir' in str(error.value)
  assert {p.name for p in (folder / 'checkpoints').iterdir()} == {'2', '4'}


def test_another_configuration_is_no_damage(finished, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(finished[0], folder)
  other = configuration(optimizer={'trainable': ('model/kernel',)})
  (folder / 'config.gin').write_text('what made it')
  with pytest.raises(CheckpointError) as error:
    train(other, folder, resolved='another')
  assert 'another choice of trained parameters' in str(error.value)
  assert 'opt_state/1/mu/model/bias' in str(error.value)
  assert (folder / 'checkpoints' / '4').is_dir()
  assert (folder / 'config.gin').read_text() == 'what made it'


@pytest.fixture
def small_disk(tmp_path):
  """A file system with room for a few checkpoints."""
  place = tmp_path / 'disk'
  place.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=420k', 'tmpfs', str(place)],
    capture_output=True,
  )
  if mounted.returncode:
    pytest.skip('mounting a small file system takes root')
  yield place
  subprocess.run(['umount', str(place)], check=True)


FULL = """
import sys
import fake
from qwenvl_jax import entry
from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.loop import train

steps, every, keep = map(int, sys.argv[2:])
config = fake.line_run(
  steps=steps,
  data=fake.Points(pause=0.01),
  checkpoint=CheckpointConfig(every=every, keep=keep),
)
sys.exit(entry.run(lambda argv: train(config, argv[0]) and None))
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_spares_what_was_saved(small_disk):
  folder = small_disk / 'run'

  def run(*arguments):
    paths = [str(KILLER.parent), str(KILLER.parents[2])]
    return subprocess.run(
      [sys.executable, '-c', FULL, folder, *map(str, arguments)],
      env=os.environ | {'PYTHONPATH': os.pathsep.join(paths)},
      capture_output=True,
      text=True,
    )

  done = run(40, 3, 10)
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr
  message = done.stderr.splitlines()[-1]
  assert message.startswith('error: saving step') and 'disk is full' in message
  steps = [p.name for p in (folder / 'checkpoints').iterdir()]
  valid = sorted(int(name) for name in steps if name.isdigit())
  assert valid and str(valid) in message
  # Without the older ones there is room again: it goes on from the newest.
  for step in valid[:-1]:
    shutil.rmtree(folder / 'checkpoints' / str(step))
  done = run(valid[-1] + 2, 99, 1)
  assert not done.returncode, done.stderr
  assert f'resumed from step {valid[-1]}' in done.stderr
  assert (folder / 'checkpoints' / str(valid[-1] + 2)).is_dir()


def test_large_parameters_are_stored_layer_by_layer(tmp_path):
  """So that conversion reads a layer without the others."""
  params = {
    'blocks': {'kernel': jnp.arange(4 * 64 * 32.0).reshape(4, 64, 32)},
    'embed': jnp.arange(300 * 32.0).reshape(300, 32),
    'scale': jnp.ones(32),
  }
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(
      tmp_path / 'params', params, save_args=save_args(params, 4096)
    )
  stores = open_stores(tmp_path / 'params')
  chunks = {k: v.chunk_layout.read_chunk.shape for k, v in stores.items()}
  assert chunks['blocks/kernel'][0] == 1
  assert max(math.prod(chunk) * 4 for chunk in chunks.values()) <= 4096
  assert chunks['scale'] == (32,)
  for path, value in (('embed', params['embed']), ('scale', params['scale'])):
    np.testing.assert_array_equal(stores[path].read().result(), value)
