import dataclasses
import itertools
import json
import os
import signal

import fake
import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from qwenvl_jax.conversion.checkpoint_io import params_folder
from qwenvl_jax.conversion.orbax_store import open_stores
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.sharding import MeshConfig
from qwenvl_jax.train import lock
from qwenvl_jax.train.checkpoint import CheckpointConfig
from qwenvl_jax.train.guard import Guard
from qwenvl_jax.train.loop import DivergedError, HeldOut, train
from qwenvl_jax.train.signals import Interrupted
from qwenvl_jax.train.step_metrics import Window


def log(workdir):
  lines = (workdir / 'log.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def scalars(workdir):
  """(step, name) -> value of all TensorBoard files."""
  found = {}
  for file in sorted((workdir / 'tensorboard').iterdir()):
    content = file.read_bytes()
    while content:
      length = int.from_bytes(content[:8], 'little')
      event = event_pb2.Event.FromString(content[12 : 12 + length])
      for value in event.summary.value:
        found[event.step, value.tag] = value.simple_value
      content = content[12 + length + 4 :]
  return found


def test_a_run_learns_and_leaves_its_records(tmp_path, capsys):
  config = fake.line_run(
    steps=30, log_every=10, checkpoint=CheckpointConfig(every=10, keep=2)
  )
  state = train(config, tmp_path / 'run')
  records = log(tmp_path / 'run')
  assert [r['step'] for r in records] == [10, 20, 30]
  assert records[-1]['loss'] < 0.1 * records[0]['loss']
  assert records[-1]['learning_rate'] == pytest.approx(
    float(config.optimizer.schedule(29))
  )
  assert all(0 <= r['waiting_for_data'] <= 1 for r in records)
  assert all(r['tokens_per_second'] > 0 for r in records)
  board = scalars(tmp_path / 'run')
  assert board[30, 'loss'] == pytest.approx(records[-1]['loss'])
  steps = sorted(p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir())
  assert steps == ['20', '30']
  assert int(state.step) == 30
  # No terminal here: lines, not a bar.
  said = capsys.readouterr().err.splitlines()
  assert any(line.startswith('step 20/30  loss') for line in said)
  assert all('\x1b' not in line for line in said)


def test_the_loss_of_a_record_is_the_mean_over_labels(tmp_path):
  one = fake.line_run(steps=4, log_every=1)
  four = fake.line_run(steps=4, log_every=4)
  train(one, tmp_path / 'one')
  train(four, tmp_path / 'four')
  iterator = one.data.iterator()
  weights = [next(iterator)['weight'].sum() for _ in range(4)]
  losses = [r['loss'] for r in log(tmp_path / 'one')]
  assert log(tmp_path / 'four')[0]['loss'] == pytest.approx(
    np.average(losses, weights=weights)
  )


def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path):
  config = fake.line_run(
    steps=12, log_every=1, checkpoint=CheckpointConfig(every=4)
  )
  whole = train(config, tmp_path / 'whole')
  train(config, tmp_path / 'parts', stop_at=5)
  (tmp_path / 'parts' / 'log.jsonl').open('a').write('{"step": 6, "los')
  same(train(config, tmp_path / 'parts'), whole)
  assert [r['step'] for r in log(tmp_path / 'parts')] == list(range(1, 13))
  values = [[r['loss'] for r in log(tmp_path / x)] for x in ('whole', 'parts')]
  assert values[0] == values[1]
  # A finished run has nothing left to do.
  same(train(config, tmp_path / 'parts'), whole)


def test_skipped_steps_are_counted_and_a_run_of_them_ends_it(tmp_path):
  data = fake.Points(bad_from=3, bad_until=5)
  state = train(fake.line_run(data=data, log_every=4), tmp_path / 'few')
  assert int(state.skipped) == 2
  assert [r['skipped'] for r in log(tmp_path / 'few')] == [1, 2, 2]
  # The mean is over the good steps.
  assert all(r['loss'] is not None for r in log(tmp_path / 'few'))

  data = fake.Points(bad_from=4, bad_until=99)
  config = fake.line_run(
    steps=50, data=data, max_skipped=3, checkpoint=CheckpointConfig(every=2)
  )
  with pytest.raises(DivergedError) as error:
    train(config, tmp_path / 'many')
  assert 'last 3 steps, up to step 7' in str(error.value)
  assert 'OptimizerConfig.peak' in str(error.value)


def test_sigterm_finds_no_second_long_step_queued(tmp_path, monkeypatch):
  ended = itertools.count(1)
  add = Window.add

  def noticed(window, metrics):
    if next(ended) == 6:
      os.kill(os.getpid(), signal.SIGTERM)
    add(window, metrics)

  monkeypatch.setattr(Window, 'add', noticed)
  # Every step is long, measured by such a notice.
  config = fake.line_run(log_every=1, notice=1e-9)
  with pytest.raises(Interrupted, match='at step 6, which is saved'):
    train(config, tmp_path)
  (saved,) = (tmp_path / 'checkpoints').iterdir()
  assert saved.name == '6'


def test_what_a_rollback_leaves_out_does_not_depend_on_waiting(tmp_path):
  config = fake.line_run(
    steps=24,
    data=fake.Points(bad_from=14, bad_until=19, bad=50.0),
    optimizer={'peak': 0.02, 'end': 0.02},
    checkpoint=CheckpointConfig(every=4, keep=3),
    guard=Guard(window=6, sigmas=6.0, rise=2.0, steps=4, limit=2),
    log_every=1,
  )
  waiting = dataclasses.replace(config, notice=1e-9)
  same(train(waiting, tmp_path / 'waiting'), train(config, tmp_path / 'not'))
  assert any('rolled_back_from' in r for r in log(tmp_path / 'waiting'))


def test_held_out_loss(tmp_path):
  config = fake.line_run(
    steps=20,
    log_every=10,
    heldout=HeldOut(fake.Points(batch_size=16), every=10, batches=2),
  )
  train(config, tmp_path)
  losses = [r['heldout_loss'] for r in log(tmp_path) if 'heldout_loss' in r]
  assert len(losses) == 2 and losses[1] < losses[0]


def test_data_that_ends_says_when(tmp_path):
  config = fake.line_run(steps=12, data=fake.Points(end=5))
  with pytest.raises(DataError, match='ended after 5 of 12 steps'):
    train(config, tmp_path)


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path):
  for config, said in (
    (fake.line_run(accumulation=3), r'may be one of \[1, 2, 4, 8\]'),
    (fake.line_run(mesh=MeshConfig(tensor=2)), r'does not fit 1 device'),
  ):
    with pytest.raises(ConfigError, match=said):
      train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_workdir_that_is_a_file_is_named(tmp_path):
  (tmp_path / 'run').write_text('')
  with pytest.raises(ConfigError, match='cannot write to --workdir'):
    train(fake.line_run(), tmp_path / 'run')


def test_a_resumed_run_says_what_of_its_configuration_changed(tmp_path, capsys):
  config = fake.line_run(steps=4, checkpoint=CheckpointConfig(every=2))
  old = 'A = 1\nx.B.rate = 0.5\nx.B.names = \\\n    (1,\n     2)\n'
  train(config, tmp_path, stop_at=2, resolved=old)
  assert 'changed since' not in capsys.readouterr().err
  new = old.replace('0.5', '0.25').replace('A = 1', 'A = 3')
  train(config, tmp_path, resolved=new)
  said = capsys.readouterr().err.splitlines()
  assert said[said.index('changed since the last start: A: 1 -> 3') + 1] == (
    'changed since the last start: x.B.rate: 0.5 -> 0.25'
  )
  assert sum('changed since' in line for line in said) == 2
  assert (tmp_path / 'config.gin').read_text() == new
  assert (tmp_path / 'config.1.gin').read_text() == old


def test_a_second_process_ends_before_it_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'WAIT_S', 0.1)
  config = fake.line_run(steps=4, checkpoint=CheckpointConfig(every=2))
  train(config, tmp_path, stop_at=2)

  def files():
    return {
      path: path.stat().st_mtime_ns
      for path in tmp_path.rglob('*')
      if path.is_file()
    }

  with lock.locked(tmp_path, print):
    before = files()
    with pytest.raises(ConfigError, match=f'use by process {os.getpid()} on'):
      train(config, tmp_path)
    assert files() == before
  assert int(train(config, tmp_path).step) == 4


@pytest.mark.parametrize('seed', [-1, 2**32, 2**64])
def test_seeds_that_jax_would_cut_are_refused(seed):
  with pytest.raises(ConfigError, match=f'TrainConfig.seed={seed} is not'):
    dataclasses.replace(fake.line_run(steps=4), seed=seed)


def test_the_best_state_is_kept_and_the_run_ends_early(tmp_path):
  # A rate that never falls overshoots: the first steps are the best.
  optimizer = {'peak': 2.0, 'end': 2.0, 'warmup': 0}
  config = fake.line_run(
    steps=100,
    optimizer=optimizer,
    heldout=HeldOut(fake.Points(batch_size=16), 2, 2, patience=3),
  )
  state = train(config, tmp_path)
  losses = {
    r['step']: r['heldout_loss'] for r in log(tmp_path) if 'heldout_loss' in r
  }
  best = min(losses, key=losses.get)
  assert int(state.step) == max(losses) == best + 6 < 100
  found = json.loads((tmp_path / 'best/best.json').read_text())
  assert found == {'step': best, 'heldout_loss': losses[best]}
  stores = open_stores(params_folder(tmp_path / 'best'))
  assert stores.keys() == {'model/kernel', 'model/bias', 'fixed/scale'}
  # Started again, it knows that it has ended.
  assert int(train(config, tmp_path).step) == int(state.step)
