"""launch/tpu_pod.sh --local: processes of this machine."""

import os
import pathlib
import re
import shutil
import signal
import sys

import pytest
from pod_support import AWKWARD, ROOT, executable, steps

# A real run of `qwenvl-train` that needs no data and compiles in a second.
LINE = """
from __gin__ import dynamic_registration

from qwenvl_jax.train import checkpoint
from qwenvl_jax.train import loop
from qwenvl_jax.train import optimizer
import fake

loop.TrainConfig:
  objective = @fake.Line()
  data = @fake.Points()
  optimizer = @optimizer.OptimizerConfig()
  checkpoint = @checkpoint.CheckpointConfig()
  log_every = 1
fake.Points.pause = 0.03
checkpoint.CheckpointConfig.every = 5
optimizer.OptimizerConfig:
  trainable = ('model/.*',)
  peak = 0.1
  end = 0.01
  warmup = 2
  steps = 2000
"""


def test_local_uses_the_environment_that_is_there(pod, tmp_path):
  pod.checkout = shutil.copytree(pod.checkout, tmp_path / 'with environment')
  program = pod.checkout / '.venv/bin/qwenvl-train'
  program.parent.mkdir(parents=True)
  shutil.copy(pod.folder / 'remote bin/qwenvl-train', program)
  executable(pod.checkout / 'launch/env.sh', '#!/bin/sh\nexit 1\n')
  done = pod.run('stage1', '--local=2', '--config=c.gin', '--workdir=runs/x')
  assert steps(done.out) == [1, 2, 3, 4]
  assert pod.starts(1)[0]['argv'][0] == '--gin_file=c.gin'
  program.unlink()
  said = pod.run(
    *local(pod, '--local=2')[0], status=1, PATH='/usr/bin:/bin'
  ).err
  assert 'there is no environment with qwenvl-train' in said


def local(pod, *arguments):
  """Arguments of a run on this machine, of the stand-in for qwenvl-train."""
  python = pod.folder / 'remote bin/qwenvl-train'
  arguments = ['stage1', '--config=my.gin', '--workdir=runs/x', *arguments]
  return arguments, {'QWENVL_POD_PYTHON': str(python)}


def test_local_processes_find_each_other(pod):
  arguments, environment = local(
    pod, '--local=3', '--devices-per-process=2', '--', *AWKWARD
  )
  done = pod.run(*arguments, **environment)
  started = [pod.starts(worker)[0] for worker in range(3)]
  assert [start['QWENVL_PROCESS_ID'] for start in started] == ['0', '1', '2']
  assert {start['QWENVL_NUM_PROCESSES'] for start in started} == {'3'}
  (coordinator,) = {start['QWENVL_COORDINATOR'] for start in started}
  assert re.fullmatch(r'127\.0\.0\.1:\d+', coordinator)
  assert started[0]['argv'] == [
    '-m',
    'qwenvl_jax.train.main',
    '--gin_file=my.gin',
    '--workdir=runs/x/stage1',
    *AWKWARD,
  ]
  assert steps(done.out) == [1, 2, 3, 4]
  for worker in range(3):
    assert steps(pod.log(worker).read_text()) == [1, 2, 3, 4]
  assert 'finished on all 3 processes' in done.err
  printed = pod.run(*arguments, '--dry-run', **environment)
  del printed
  assert not pod.calls()


@pytest.mark.parametrize(
  ('code', 'status', 'said'),
  [(7, 7, 'worker 1 died (exit status 7)'), (-9, 137, 'died (signal KILL)')],
)
def test_local_one_death_ends_all(pod, code, status, said):
  pod.train(steps=9, wait=5, exit={'1': [3, code]})
  arguments, environment = local(pod, '--local=3')
  done = pod.run(*arguments, status=status, **environment)
  assert said in done.err
  assert 'worker 1: Traceback: the cause stands here' in done.err
  assert 'worker 2 died' not in done.err
  for worker in 0, 2:
    assert 'saved by SIGTERM' in pod.log(worker).read_text()


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_local_signals_are_passed_on_and_waited_for(pod, signum):
  pod.train(steps=9, wait=5)
  arguments, environment = local(pod, '--local=2')
  running = pod.popen(*arguments, **environment)
  for worker in (0, 1):
    pod.wait_for(lambda worker=worker: pod.log(worker))
    log = pod.log(worker)
    pod.wait_for(lambda log=log: 'step 5' in log.read_text())
  running.send_signal(signum)
  err = running.communicate(timeout=300)[1]
  assert running.returncode == 128 + signum, err
  for worker in (0, 1):
    assert pod.log(worker).read_text().count('saved by SIGTERM') == 1


@pytest.mark.slow
def test_local_trains_for_real_and_survives(pod, tmp_path):
  config = tmp_path / 'line.gin'
  config.write_text(LINE)
  arguments = ['stage1', '--local=2', '--devices-per-process=2']
  arguments += [f'--config={config}', f'--workdir={tmp_path / "my runs"}']
  environment = {
    'QWENVL_POD_PYTHON': sys.executable,
    'QWENVL_CONFIG_PACKAGES': 'fake',
    'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests/train"}',
  }

  def until(start):
    running = pod.popen(*arguments, **environment)
    for line in running.stdout:
      if line.startswith(start):
        return running
    raise AssertionError(running.stderr.read())

  running = until('step 7/')
  running.send_signal(signal.SIGTERM)
  err = running.communicate(timeout=120)[1]
  assert running.returncode == 128 + signal.SIGTERM, err
  said = r'stopped by SIGTERM at step (\d+), which is saved'
  (saved,) = re.findall(said, pod.log(0).read_text())
  # The same command goes on from there; then one process dies.
  running = until(f'resumed from step {saved} of')
  child = pod.log(1).with_name('pid').read_text().strip()
  children = pathlib.Path(f'/proc/{child}/task/{child}/children').read_text()
  os.kill(int(children.split()[0]), signal.SIGKILL)
  err = running.communicate(timeout=120)[1]
  assert running.returncode == 128 + signal.SIGKILL, err
  assert 'worker 1 died (signal KILL)' in err
  assert 'process 1 of 2' in pod.log(0).read_text().splitlines()[-1]
