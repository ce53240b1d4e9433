"""launch/tpu_pod.sh, against stand-ins for gcloud and what runs on workers."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]

# A real run of `qwenvl-train` that needs no data and compiles in a second.
LINE = """
from __gin__ import dynamic_registration

from qwenvl_jax.train import checkpoint
from qwenvl_jax.train import loop
from qwenvl_jax.train import optimizer
import standin

loop.TrainConfig:
  objective = @standin.Line()
  data = @standin.Points()
  optimizer = @optimizer.OptimizerConfig()
  checkpoint = @checkpoint.CheckpointConfig()
  log_every = 1
standin.Points.pause = 0.03
checkpoint.CheckpointConfig.every = 5
optimizer.OptimizerConfig:
  trainable = ('model/.*',)
  peak = 0.1
  end = 0.01
  warmup = 2
  steps = 2000
"""

# Its clock runs so many times faster.
SPEEDUP = 100
TYPE = '--type=v5litepod-16'
ONE_HOST = '--type=v5litepod-8'
# Values that a missing quote anywhere between here and a worker would break.
AWKWARD = [
  """--gin.Optimizer.trainable=('a b/.*', "it's (c)|d", '$HOME \\\\ *')""",
  "--gin.NOTE='two  spaces; and & more'",
]


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
  """A small checkout of its own, so that its state in git is known."""
  root = tmp_path_factory.mktemp('launch') / 'a checkout'
  for name in ('launch', 'configs'):
    shutil.copytree(ROOT / name, root / name)
  for name in ('setup.cfg', 'pyproject.toml', 'constraints.txt'):
    shutil.copy(ROOT / name, root / name)
  (root / 'tests').mkdir()
  (root / 'tests/left_out').touch()
  git(root, 'init', '--quiet')
  git(root, 'add', '--all')
  git(root, 'commit', '--quiet', '--message=all')
  return root


def git(root, *arguments):
  identity = ('-c', 'user.name=t', '-c', 'user.email=t@example.org')
  subprocess.run(['git', *identity, *arguments], cwd=root, check=True)


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


class Pod:
  """A cloud that plays a script, and tpu_pod.sh against it."""

  def __init__(self, folder, checkout):
    self.folder = folder / 'the cloud'
    self.checkout = checkout
    python = shlex.quote(sys.executable)
    executable(
      folder / 'bin/gcloud',
      f'#!/bin/sh\nexec {python} {shlex.quote(str(HERE))}/gcloud_standin.py '
      '"$@"\n',
    )
    remote = self.folder / 'remote bin'
    trainer = shlex.quote(str(HERE / 'trainer_standin.py'))
    executable(
      remote / 'qwenvl-train', f'#!/bin/sh\nexec {python} {trainer} "$@"\n'
    )
    executable(remote / 'gcsfuse', (HERE / 'gcsfuse_standin.sh').read_text())
    executable(remote / 'curl', '#!/bin/sh\necho "$WORKER"\n')
    executable(remote / 'python3.11', (HERE / 'python_standin.sh').read_text())
    self._environment = {
      **{k: v for k, v in os.environ.items() if not k.startswith('QWENVL_')},
      'PATH': f'{folder / "bin"}:{os.environ["PATH"]}',
      'STANDIN': str(self.folder),
      'QWENVL_POD_SPEEDUP': str(SPEEDUP),
      'QWENVL_POD_STATE': str(folder / 'state'),
      'QWENVL_POD_TPU': 'pod1',
      'QWENVL_POD_ZONE': 'us-west4-a',
    }
    self.state = folder / 'state'
    self.play()
    self.train(steps=4)

  def play(self, *attempts, workers=2, **more):
    """Says what requests for a TPU come to."""
    attempts = attempts or [{'states': ['ACTIVE']}]
    script = {'workers': workers, 'attempts': attempts, **more}
    (self.folder / 'script.json').write_text(json.dumps(script))

  def train(self, **script):
    """Says what the program on the workers does."""
    (self.folder / 'trainer.json').write_text(json.dumps(script))

  def popen(self, *arguments, **environment):
    return subprocess.Popen(
      [str(self.checkout / 'launch/tpu_pod.sh'), *arguments],
      env=self._environment | environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *arguments, status=0, **environment):
    process = self.popen(*arguments, **environment)
    process.out, process.err = process.communicate(timeout=120)
    said = f'{process.out}\n-- and --\n{process.err}'
    assert process.returncode == status, said
    return process

  def stage(self, *arguments, status=0, **environment):
    return self.run(
      'stage2',
      TYPE,
      '--workdir=gs://b/runs',
      *arguments,
      status=status,
      **environment,
    )

  def calls(self, *words):
    """What gcloud was asked, of what contains these words."""
    path = self.folder / 'calls.jsonl'
    lines = path.read_text().splitlines() if path.exists() else ()
    calls = map(json.loads, lines)
    return [call for call in calls if set(words) <= set(call)]

  def starts(self, worker):
    """How the program was started on a worker, each time."""
    path = self.folder / f'starts {worker}'
    return [json.loads(line) for line in path.read_text().splitlines()]

  def log(self, worker):
    """The log of a process of the newest run with --local."""
    runs = (self.state / 'local').glob(f'*/worker{worker}/job/log')
    return max(runs, key=lambda path: path.stat().st_ctime_ns, default=None)

  def wait_for(self, condition):
    deadline = time.monotonic() + 60
    while not condition():
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def end(self):
    for pid in [
      *self.folder.glob('tpu */worker */qwenvl_jax/job/pid'),
      *self.state.glob('local/*/*/job/pid'),
    ]:
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except (ProcessLookupError, ValueError):
        continue


@pytest.fixture
def pod(tmp_path, checkout):
  pod = Pod(tmp_path, checkout)
  yield pod
  pod.end()


def steps(text):
  return [int(step) for step in re.findall(r'^step (\d+)/', text, re.M)]


def test_from_nothing_to_done_and_again(pod):
  pod.play(
    {'states': ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']}, workers=3
  )
  options = [
    '--spot',
    '--data=gs://other-b.1/my data',
    '--create-flag=--network=n',
  ]
  done = pod.stage(*options, '--', *AWKWARD)
  (create,) = pod.calls('create')
  assert create[3:] == [
    'create',
    'pod1',
    '--node-id=pod1',
    '--accelerator-type=v5litepod-16',
    '--runtime-version=v2-alpha-tpuv5-lite',
    '--spot',
    '--network=n',
    '--zone=us-west4-a',
    '--quiet',
  ]
  assert 'in the queue until chips are free' in done.err
  assert 'installed on 3 worker(s)' in done.err
  for worker in range(3):
    (start,) = pod.starts(worker)
    assert start['cwd'].endswith('/qwenvl_jax/checkout')
    home = pathlib.Path(start['cwd']).parents[1]
    # The trainer itself opens buckets.
    assert start['argv'] == [
      '--gin_file=configs/stage2.gin',
      '--gin_file=configs/topology/v5e_16/mesh.gin',
      '--workdir=gs://b/runs/stage2',
      '--gin.INIT="gs://b/runs/stage1"',
      '--gin.DATA="gs://other-b.1/my data"',
      '--distributed',
      *AWKWARD,
    ]
    assert not (home / 'qwenvl_jax/buckets').exists()
    assert '.[gcs,tpu]' in (home / 'pip').read_text()
    assert not (home / 'qwenvl_jax/checkout/tests').exists()
  assert steps(done.out) == [1, 2, 3, 4]
  (copy,) = pod.state.glob('pod1/stage2-*.log')
  assert steps(copy.read_text()) == [1, 2, 3, 4]
  assert 'stage2 is finished' in done.err
  assert 'launch/tpu_pod.sh down' in done.err
  # Zone and type are remembered; nothing is created or installed again.
  again = pod.run('stage2', '--workdir=gs://b/runs', QWENVL_POD_ZONE='')
  assert 'installed already on all workers' in again.err
  assert len(pod.calls('create')) == len(pod.calls('scp')) == 1


def test_a_dry_run_prints_what_a_run_does(pod):
  pod._environment['QWENVL_POD_SPEEDUP'] = '1'
  arguments = ['--reserved', '--project=p', '--', *AWKWARD]
  printed = pod.stage('--dry-run', *arguments, PATH='/usr/bin:/bin')
  assert not pod.calls()
  pod.stage(*arguments)
  commands = [shlex.split(line) for line in printed.out.splitlines()]
  assert {command[0] for command in commands} == {'gcloud'}
  began = r'follow \d{8}T\d{6} '
  made = [
    [re.sub(began, 'follow BEGAN ', word) for word in call]
    for call in pod.calls()
  ]
  # The stages of a pipeline end in any order: how often the end is asked for.
  assert without_repeats(made) == [command[1:] for command in commands]


def without_repeats(calls):
  """Calls less pairs of calls that repeat the two before."""
  kept = []
  for call in calls:
    kept.append(call)
    while len(kept) >= 4 and kept[-2:] == kept[-4:-2]:
      del kept[-2:]
  return kept


def test_code_as_it_is_reaches_the_workers(pod, tmp_path):
  pod.checkout = tmp_path / 'changed'
  shutil.copytree(ROOT / 'launch', pod.checkout / 'launch')
  for name in ('setup.cfg', 'pyproject.toml', 'constraints.txt'):
    shutil.copy(ROOT / name, pod.checkout / name)
  (pod.checkout / '.gitignore').write_text('ignored\n')
  git(pod.checkout, 'init', '--quiet')
  git(pod.checkout, 'add', '--all')
  git(pod.checkout, 'commit', '--quiet', '--message=all')
  assert 'NOT COMMITTED' not in pod.run('up', TYPE).err
  (pod.checkout / 'new file').write_text('new')
  (pod.checkout / 'ignored').write_text('secret')
  (pod.checkout / 'setup.cfg').write_text('changed')
  done = pod.run('up', TYPE)
  assert 'WITH CHANGES THAT ARE NOT COMMITTED' in done.err
  assert '?? "new file"' in done.err and 'M setup.cfg' in done.err
  for worker in range(2):
    there = pod.folder / f'tpu 1/worker {worker}/qwenvl_jax/checkout'
    assert (there / 'new file').read_text() == 'new'
    assert (there / 'setup.cfg').read_text() == 'changed'
    assert not (there / 'ignored').exists()
  assert len(pod.calls('scp')) == 2
  # Nor is anything left staged, or an object in the repository.
  status = subprocess.run(
    ['git', 'status', '--short'],
    cwd=pod.checkout,
    capture_output=True,
    text=True,
  )
  assert status.stdout == ' M setup.cfg\n?? "new file"\n'


@pytest.mark.parametrize(
  ('error', 'said'),
  [
    (
      "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerProjectPerZone' has "
      'been exceeded. Limit: 8 in zone us-west4-a.',
      'Ask for more at https://console.cloud.google.com/iam-admin/quotas',
    ),
    (
      'PERMISSION_DENIED: Cloud TPU API has not been used in project p',
      'gcloud services enable tpu.googleapis.com',
    ),
    ('PERMISSION_DENIED: lacks tpu.nodes.create', 'roles/tpu.admin'),
    ('INVALID_ARGUMENT: unknown acceleratorType', 'accelerator-types list'),
  ],
)
def test_a_refused_request_says_what_helps(pod, error, said):
  pod.play({'error': error})
  done = pod.stage(status=1)
  assert error in done.err and said in done.err
  assert len(pod.calls('create')) == 1 and not pod.calls('ssh')


def test_who_may_not_ask_is_told_at_once(pod):
  pod.play(blind=99, says='You do not have credentials: gcloud auth login')
  done = pod.stage(status=1)
  assert 'have the roles TPU Admin' in done.err
  assert len(pod.calls()) == 1


def test_a_request_that_fails_in_the_queue_for_quota_ends_it(pod):
  pod.play({'states': ['PROVISIONING', 'FAILED'], 'failed': 'Quota exceeded'})
  done = pod.stage(status=1)
  assert 'was not granted (quota)' in done.err
  assert len(pod.calls('create')) == 1


def test_without_capacity_and_preempted_it_goes_on_until_done(pod):
  pod.play(
    {'states': ['PROVISIONING', 'FAILED'], 'failed': 'no more capacity'},
    {'states': ['PROVISIONING', 'SUSPENDED']},
    {'states': ['ACTIVE']},
    {'states': ['ACTIVE']},
    blind=3,
  )
  pod.train(steps=5, preempt=[3])
  done = pod.stage('--spot', '--backoff=10')
  waits = re.findall(r'(\w+); trying again in (\S+) \(restart (\d)', done.err)
  assert waits == [
    ('capacity', '0:00:10', '1'),
    ('preempted', '0:00:20', '2'),
    ('preempted', '0:00:40', '3'),
  ]
  assert 'has no free v5litepod-16 now' in done.err
  # What is over is deleted before the next: it would count against the quota.
  made = [
    call[3] for call in pod.calls() if call[3] in ('create', 'delete', 'scp')
  ]
  again = ['delete', 'create']
  assert made == ['create', *again, *again, 'scp', *again, 'scp']
  assert all('--force' in call for call in pod.calls('delete'))
  assert steps(done.out) == [1, 2, 3, 4, 5]
  assert done.out.count('resumed from step 3') == 1
  before, after = (
    [word.replace(f'tpu {number}/', '') for word in start['argv']]
    for number, start in zip((3, 4), pod.starts(0), strict=True)
  )
  assert before == after
  assert len(list(pod.state.glob('pod1/stage2-*.log'))) <= 2


def test_restarts_end_at_their_limit(pod):
  pod.train(steps=9, preempt=[1, 2, 3])
  done = pod.stage('--spot', '--max-restarts=1', status=3)
  assert 'preempted again, after 1 restarts' in done.err
  assert len(pod.calls('create')) == 2


def test_a_worker_that_fails_to_install_is_named(pod):
  (pod.folder / 'no_space').write_text('1\n')
  done = pod.stage(status=1)
  assert 'worker 1: ERROR: Could not install packages: No space' in done.err
  assert 'the installation failed on worker(s) 1, see above' in done.err
  assert 'worker 0: ready' in done.err
  assert (
    len(pod.calls('create')) == 1 and not (pod.folder / 'starts 0').exists()
  )
  # Mended, the same command goes on with the TPU that is there.
  (pod.folder / 'no_space').unlink()
  pod.stage()
  assert len(pod.calls('create')) == 1


def test_data_may_be_read_through_a_folder(pod):
  pod.stage('--data=gs://other-b.1/my data', '--mount-data')
  (start,) = pod.starts(1)
  buckets = pathlib.Path(start['cwd']).parent / 'buckets'
  assert f'--gin.DATA="{buckets}/other-b.1/my data"' in start['argv']
  assert '--workdir=gs://b/runs/stage2' in start['argv']
  assert [path.name for path in buckets.iterdir()] == ['other-b.1']


def test_a_bucket_that_cannot_be_mounted_is_named(pod):
  done = pod.stage('--data=gs://missing/data', '--mount-data', status=1)
  assert 'worker 1: Error: bucket missing does not exist' in done.err
  assert 'worker 0: FAILED: bucket missing cannot be mounted' in done.err
  assert not (pod.folder / 'starts 0').exists()


def test_a_connection_that_breaks_costs_no_line(pod):
  pod.train(steps=8, drop=[2, 5])
  done = pod.stage()
  assert steps(done.out) == list(range(1, 9))
  assert 'connecting again' in done.err
  follows = [call for call in pod.calls('ssh') if ' follow ' in str(call)]
  assert len(follows) == 3 and len(pod.starts(0)) == 1


@pytest.mark.parametrize(
  ('status', 'said'),
  [
    (7, 'worker 1 ended with exit status 7'),
    (-9, 'worker 1 was killed (exit 137; out of memory?)'),
  ],
)
def test_a_crash_is_no_preemption(pod, status, said):
  pod.train(steps=9, wait=6, exit={'1': [3, status]})
  done = pod.stage(status=1)
  assert said in done.err
  assert 'worker 1: Traceback: the cause stands here' in done.err
  assert 'worker 0 ' not in done.err.split('the cause stands here')[1]
  assert 'starting it again would not help' in done.err
  assert len(pod.calls('create')) == len(pod.starts(1)) == 1
  # Worker 0 waited for it in vain, and has been told to end.
  log = pod.folder / 'tpu 1/worker 0/qwenvl_jax/job/log'
  assert 'saved by SIGTERM' in log.read_text()


def test_a_lost_worker_without_a_cause_is_started_again(pod):
  pod.train(steps=5, exit={'0': [3, 75], '1': [3, 75]})
  done = pod.stage()
  assert 'interrupted; trying again' in done.err
  assert len(pod.calls('create')) == 1 and len(pod.starts(1)) == 2
  assert steps(done.out) == [1, 2, 3, 4, 5]


def test_a_reboot_is_no_crash(pod):
  pod.train(steps=5, wait=3)
  running = pod.popen('stage2', TYPE, '--workdir=gs://b/runs')
  for line in running.stdout:
    if line.startswith('step 3'):
      break
  pod.train(steps=5)
  for job in pod.folder.glob('tpu 1/worker */qwenvl_jax/job'):
    (job / 'boot').write_text('an earlier one\n')
    os.killpg(int((job / 'pid').read_text()), signal.SIGKILL)
  out, err = running.communicate(timeout=300)
  assert not running.returncode, err
  assert 'the workers say: rebooted' in err
  assert steps(out) == [4, 5] and len(pod.calls('create')) == 1


def test_what_does_not_end_is_killed_in_the_end(pod):
  pod.train(steps=5, wait=3, deaf=True)
  running = pod.popen('stage2', TYPE, '--workdir=gs://b/runs')
  for line in running.stdout:
    if line.startswith('step 3'):
      break
  stopped = pod.run('stop', '--grace=1')
  assert 'worker 1: stage2 did not end within 1 s: killed' in stopped.out
  assert 'stage2 was stopped' in running.communicate(timeout=300)[1]
  assert running.returncode == 143


def test_workers_with_an_old_python_get_a_newer_one(pod):
  remote = pod.folder / 'remote bin'
  standin = (remote / 'python3.11').read_text()
  executable(remote / 'python3', standin)
  executable(pod.folder / 'of uv/python3.11', standin)
  for version in (11, 12, 13):
    executable(remote / f'python3.{version}', '#!/bin/sh\nexit 1\n')
  assert 'installed on 2 worker(s)' in pod.run('up', TYPE).err


def test_evaluation_needs_its_command(pod, tmp_path):
  arguments = ['eval', ONE_HOST, '--workdir=gs://b/r', '--dry-run']
  arguments += ['--data=/d', '--', '--tasks', 'a,b']
  pod.checkout = shutil.copytree(pod.checkout, tmp_path / 'evaluating')
  setup = pod.checkout / 'setup.cfg'
  commands = setup.read_text()
  without = re.sub(r' *qwenvl-eval *=.*\n', '', commands)
  setup.write_text(without)
  assert 'no command qwenvl-eval' in pod.run(*arguments, status=1).err
  setup.write_text(without + '  qwenvl-eval = qwenvl_jax.eval.main:main\n')
  said = (
    'qwenvl-eval --checkpoint=gs://b/r/stage3 --out=gs://b/r/eval '
    '--data_dir=/d --tasks a,b'
  )
  assert said in pod.run(*arguments).out
  arguments[4] = '--data=gs://b/d'
  assert '--data_dir=mount://b/d' in pod.run(*arguments[:5], '--mount-data').out


def test_a_server_runs_until_it_is_stopped(pod, tmp_path):
  shutil.copy(
    pod.folder / 'remote bin/qwenvl-train',
    pod.folder / 'remote bin/qwenvl-serve',
  )
  pod.play(workers=1)
  pod.train(steps=3, wait=2)
  key = tmp_path / 'my key'
  key.write_text('a secret of some length')
  arguments = ['serve', ONE_HOST, '--init=gs://b/chat', '--port=8111']
  arguments += [f'--api-key-file={key}', '--', '--slots', '4', '--demo']
  running = pod.popen(*arguments)
  for line in running.stdout:
    if line.startswith('step 2'):
      break
  (start,) = pod.starts(0)
  assert start['argv'] == [
    '--checkpoint=gs://b/chat',
    '--port=8111',
    '--api_key_file=../api_key',
    *('--slots', '4', '--demo'),
  ]
  brought = pathlib.Path(start['cwd']) / '../api_key'
  assert brought.read_text() == key.read_text()
  assert brought.stat().st_mode & 0o777 == 0o600
  home = pathlib.Path(start['cwd']).parents[1]
  assert not (home / 'qwenvl_api_key').exists()
  assert '.[demo,gcs,serve,tpu]' in (home / 'pip').read_text()
  # The key itself is in nothing that is run or said.
  assert 'secret' not in (pod.folder / 'calls.jsonl').read_text()
  assert 'serve stopped (exit 143)' in pod.run('stop').out
  out, err = running.communicate(timeout=300)
  assert running.returncode == 143 and 'starts it again' in err
  assert 'secret' not in out + err
  assert 'http://127.0.0.1:8111/v1' in err


def test_the_way_to_a_server_is_said(pod):
  arguments = ['serve', ONE_HOST, '--workdir=gs://b/r', '--ssh=iap']
  out = pod.run(*arguments, '--project=p', '--dry-run').out
  assert '--checkpoint=gs://b/r/stage3' in out
  (tunnel,) = [line for line in out.splitlines() if ' -L ' in line]
  assert shlex.split(tunnel) == [
    *('gcloud', 'alpha', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod1'),
    '--worker=0',
    '--tunnel-through-iap',
    '--ssh-flag=-N -L 127.0.0.1:8000:127.0.0.1:8000',
    *('--zone=us-west4-a', '--project=p'),
  ]


def test_a_server_does_not_run_on_several_machines(pod):
  done = pod.run('serve', TYPE, '--init=gs://b/chat', status=2)
  assert 'up to 8 chips' in done.err
  # A TPU that is there tells its workers only.
  pod.play(workers=2, existing=True)
  done = pod.run('serve', '--init=gs://b/chat', status=1)
  assert 'serve runs on one machine; TPU pod1 has several' in done.err


def test_a_server_runs_here(pod, tmp_path):
  key = tmp_path / 'key'
  arguments = ['serve', '--local=1', '--init=my chat', f'--api-key-file={key}']
  assert 'No such file' in pod.run(*arguments, status=1).err
  key.write_text('a secret of some length')
  python = pod.folder / 'remote bin/qwenvl-train'
  pod.run(*arguments, QWENVL_POD_PYTHON=str(python))
  assert pod.starts(0)[0]['argv'] == [
    *('-m', 'qwenvl_jax.serve.main'),
    *('--checkpoint=my chat', '--port=8000', f'--api_key_file={key}'),
  ]


def test_a_budget_ends_it_after_saving(pod):
  pod.train(steps=3, wait=2)
  done = pod.stage('--budget=0.05', '--delete-after', status=3)
  assert 'the budget of 0.05 TPU hours is used up' in done.err
  assert 'worker 1: stage2 stopped (exit 143)' in done.err
  assert len(pod.calls('delete')) == 1
  # It counts over calls, until more is given.
  done = pod.stage('--budget=0.05', status=3)
  assert len(pod.calls('create')) == 1
  pod.train(steps=3)
  assert 'resumed from step 2' in pod.stage('--budget=9').out


def test_detached_looked_at_and_stopped(pod):
  pod.train(steps=9, wait=3)
  running = pod.popen('stage2', TYPE, '--workdir=gs://b/runs')
  for line in running.stdout:
    if line.startswith('step 3'):
      break
  assert 'looks after pod1 already' in pod.stage(status=1).err
  running.send_signal(signal.SIGINT)
  assert 'detached: stage2 goes on' in running.communicate(timeout=300)[1]
  assert running.returncode == 130
  status = pod.run('status').out
  assert 'TPU pod1 in us-west4-a: READY (queued resource: ACTIVE' in status
  assert re.search(
    r'^worker 1: stage2 running since \S+  step 3/9', status, re.M
  )
  assert steps(pod.run('logs', '--worker=1', '--lines=2').out) == [2, 3]
  # The same command takes up where it was; another is refused.
  assert 'started otherwise' in pod.stage('--steps=5', status=1).err
  running = pod.popen('stage2', TYPE, '--workdir=gs://b/runs')
  pod.wait_for(lambda: len(pod.calls('ssh')) > 11)
  stopped = pod.run('stop')
  assert 'worker 1: stage2 stopped (exit 143)' in stopped.out
  out, err = running.communicate(timeout=300)
  assert running.returncode == 143 and 'stage2 was stopped' in err
  assert steps(out) == [] and len(pod.starts(0)) == 1
  assert 'stage2 stopped (exit 143)' in pod.run('status').out
  assert 'Nobody to ask: pass --yes' in pod.run('down', status=1).err
  assert not pod.calls('delete')
  pod.run('down', '--yes')
  assert len(pod.calls('delete')) == 1
  assert 'ABSENT' in pod.run('status').out
  assert 'there is no TPU pod1' in pod.run('down', '--yes').err


def test_an_existing_tpu_is_used_and_not_made_anew(pod):
  pod.play({'states': ['ACTIVE']}, existing=True)
  pod.train(steps=5, preempt=[4])
  done = pod.stage(status=1)
  assert steps(done.out) == [1, 2, 3, 4]
  assert 'TPU pod1 is PREEMPTED, and was not requested through' in done.err
  assert not pod.calls('create')
  pod.run('down', '--yes')
  assert pod.calls('tpu-vm', 'delete')


def test_ways_to_the_workers(pod):
  for way, command, flag in (
    ('internal', 'compute', '--internal-ip'),
    ('iap', 'alpha', '--tunnel-through-iap'),
  ):
    printed = pod.stage('--dry-run', f'--ssh={way}').out
    for line in printed.splitlines():
      words = shlex.split(line)
      if 'ssh' in words or 'scp' in words:
        assert words[1] == command and flag in words
  printed = pod.run(
    'stage2', '--type=v5p-4096', '--workdir=gs://b/r', '--dry-run'
  ).out
  assert 'gcloud alpha compute tpus tpu-vm ssh' in printed
  assert printed.count(' --batch-size=100 ') == printed.count(' tpu-vm s')


@pytest.mark.parametrize(
  ('kind', 'runtime', 'topology'),
  [
    ('v4-512', 'tpu-ubuntu2204-base', 'v4_256'),
    ('v5litepod-256', 'v2-alpha-tpuv5-lite', 'v5e_256'),
    ('v5p-128', 'v2-alpha-tpuv5', 'v5p_64'),
    ('v6e-256', 'v2-alpha-tpuv6e', 'v6e_256'),
  ],
)
def test_a_type_decides_software_and_config(
  pod, tmp_path, kind, runtime, topology
):
  pod.checkout = shutil.copytree(pod.checkout, tmp_path / 'with topologies')
  folder = pod.checkout / f'configs/topology/{topology}'
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'mesh.gin').touch()
  (folder / 'stage2.gin').touch()
  arguments = [f'--type={kind}', '--workdir=gs://b/r', '--dry-run']
  done = pod.run('stage3', *arguments)
  assert f'--runtime-version={runtime}' in done.out
  files = f'stage3.gin --gin_file=configs/topology/{topology}/mesh.gin --w'
  assert files in done.out
  assert f'topology/{topology}/stage2.gin' in pod.run('stage2', *arguments).out
  arguments.append('--config=configs/stage1_unpacked.gin')
  (pod.checkout / 'configs/stage1_unpacked.gin').touch()
  assert f'topology/{topology}/mesh.gin' in pod.run('stage2', *arguments).out
  assert 'topology/' not in pod.run('stage3', '--topology=none', *arguments).out
  assert (
    '--gin_file=my.gin --workdir'
    in pod.run('stage3', '--topology=my.gin', *arguments).out
  )


def test_settings_come_from_options_environment_and_file(pod, tmp_path):
  file = tmp_path / 'my settings'
  file.write_text(
    '# a pod\ntype=v6e-8\nzone=file-b\nproject=file-p\ncapacity=spot\n'
    'workdir=gs://b/r\ncreate-flag=--labels=a=b\n'
  )
  out = pod.run(
    'stage2', '--settings', str(file), '--project=option-p', '--dry-run'
  ).out
  assert '--accelerator-type=v6e-8' in out and '--spot' in out
  assert '--labels=a=b' in out
  assert '--zone=us-west4-a --project=option-p' in out
  file.write_text('type=v6e-8\ncolour=red\n')
  said = pod.run('up', f'--settings={file}', status=1).err
  assert "line 2: there is no setting 'colour'" in said


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['stage4'], 'no such verb: stage4'),
    (['up', '--colour=red'], 'unknown option --colour'),
    (['up', '--type'], '--type has no value'),
    (['up', '--type=v5e-256'], 'v5litepod-256 (v5e)'),
    (['up', '--zone=', '--type=v4-8'], '--zone is missing'),
    (['up', 'stage2'], 'go after --'),
    (['stage2'], '--workdir is missing'),
    (['stage1', '--workdir=gs://b/r'], 'stage1 needs --init'),
    (['stage2', '--workdir=r', '--budget=much'], 'number of hours'),
    (['stage2', '--workdir=r', '--local=0'], 'one process or more'),
    (['serve'], '--init DIR is missing'),
    (['serve', '--init=c', '--port=99999'], '1 to 65535'),
    (['serve', '--init=c', '--local=2'], 'one process: --local 1'),
    (['down', '--tpu=My_Pod'], 'lower-case'),
  ],
)
def test_wrong_usage_is_told_apart(pod, arguments, said):
  environment = {'QWENVL_POD_ZONE': ''} if '--zone=' in arguments else {}
  assert said in pod.run(*arguments, status=2, **environment).err
  assert not pod.calls()


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--zone=us-a\ntype=v4-8'], r'--zone us-a\ntype=v4-8: '),
    (['--project=p q'], '--project p q'),
    (['--tpu='], '--tpu is missing its value'),
    (['--backoff=8s'], 'not a whole number'),
    (['--backoff=٣'], 'not a whole number'),
    (['--max-restarts=' + '9' * 30], 'not a whole number'),
    (['--budget=1e9'], 'number of hours'),
    (['--workdir=gs://b/r\x1b[31m'], 'control characters'),
    (['--runtime-version=$(touch ran)'], '--runtime-version'),
    (['--worker=0;touch ran'], '--worker'),
    (['--ssh=external -x'], '--ssh'),
  ],
)
def test_hostile_options_are_refused(pod, arguments, said, tmp_path):
  done = pod.stage(*arguments, status=2)
  assert said in done.err and '\x1b' not in done.err
  assert not pod.calls()


def test_paths_reach_the_workers_as_they_are(pod):
  text = '$(touch ran) `touch ran` a\';touch ran;\' "$HOME" \\ & |'
  pod.run(
    *('stage2', TYPE, f'--init={text}', f'--data={text}'),
    *(f'--config={text}', f'--workdir=gs://b/{text}', '--', text),
  )
  argv = pod.starts(1)[0]['argv']
  quoted = text.replace('\\', '\\\\').replace('"', '\\"')
  assert f'--workdir=gs://b/{text}/stage2' in argv
  assert f'--gin_file={text}' in argv and argv[-1] == text
  assert f'--gin.INIT="{quoted}"' in argv and f'--gin.DATA="{quoted}"' in argv
  assert not list(pod.folder.parent.rglob('ran'))
  assert not (ROOT / 'ran').exists()


def test_numbers_are_decimal(pod):
  pod.play({'states': ['FAILED'], 'failed': 'no more capacity'})
  done = pod.stage('--backoff=08', '--max-restarts=01', status=3)
  assert 'trying again in 0:00:08 (restart 1 of at most 1' in done.err


@pytest.mark.parametrize('text', ['', '\n', 'nan', '-5', '$(touch ran)', '1e9'])
def test_a_damaged_file_of_spent_hours_ends_it_before_a_request(pod, text):
  (pod.state / 'pod1').mkdir(parents=True)
  spent = pod.state / 'pod1/spent-stage2'
  spent.write_text(text)
  done = pod.stage('--budget=1', status=1)
  assert 'not the seconds that the TPU was used for stage2' in done.err
  assert not pod.calls() and spent.read_text() == text
  spent.write_text('3600\n')
  assert 'is used up' in pod.stage('--budget=1', status=3).err
  assert not pod.calls('create') and spent.read_text() == '3600\n'


def test_hours_that_cannot_be_written_end_it_before_a_request(pod):
  (pod.state / 'pod1/spent-stage2').mkdir(parents=True)
  assert 'is no regular file' in pod.stage(status=1).err
  assert not pod.calls()


def test_a_tpu_under_repair_is_not_waited_for_without_end(pod):
  pod.play({'states': ['ACTIVE']}, tpu='REPAIRING')
  speed = {'QWENVL_POD_SPEEDUP': '20000'}
  done = pod.stage('--max-restarts=1', status=3, **speed)
  assert 'ACTIVE, TPU REPAIRING after ' in done.err
  assert 'preempted again, after 1 restarts' in done.err
  assert len(pod.calls('create')) == 2 and pod.calls('delete')
  pod.play({'states': ['WAITING_FOR_RESOURCES']})
  pod.run('down', '--yes')
  done = pod.stage('--queue-hours=1', status=3, **speed)
  assert '--queue-hours is used up; the request stays' in done.err


def test_who_died_is_shown_and_taken_over_from(pod):
  pod.train(steps=9, wait=3)
  running = pod.popen('stage2', TYPE, '--workdir=gs://b/runs')
  for line in running.stdout:
    if line.startswith('step 3'):
      break
  who = f'stage2: process {running.pid} on '
  assert f'looked after by {who}' in pod.run('status').out
  assert 'would request it anew' in pod.run('down', '--yes', status=1).err
  running.kill()
  running.wait()
  status = pod.run('status').out
  assert (
    f'nobody looks after it ({who}' in status and 'paid for until' in status
  )
  again = pod.popen('stage2', TYPE, '--workdir=gs://b/runs')
  pod.wait_for(lambda: 'looked after by' in pod.run('status').out)
  pod.run('stop')
  assert again.wait(60) == 143
  assert 'nobody looks after it: ' in pod.run('status').out
  pod.run('down', '--yes')
  assert 'nobody' not in pod.run('status').out


def test_a_supervisor_that_fails_says_that_the_tpu_runs_on(pod):
  pod.train(steps=9, exit={'1': [3, 7], '0': [3, 7]})
  done = pod.stage(status=1)
  assert 'nobody looks after TPU pod1 now. If it is there, it runs' in done.err


def test_logs_of_workers_do_not_command_the_terminal(pod):
  pod.train(steps=2, says='\x1b]0;title\x07 \x9b31m caf\xe9')
  done = pod.stage()
  shown = r'\x1b]0;title\x07 \x9b31m caf\xe9'.replace(r'\xe9', '\xe9')
  assert shown in done.out and shown in pod.run('logs').out
  assert '\x1b' not in done.out + done.err
  # The copy has what the worker wrote.
  (copy,) = pod.state.glob('pod1/stage2-*.log')
  assert '\x1b]0;title' in copy.read_text()


def test_nobody_who_reads_the_log_is_no_end(pod):
  pod.train(steps=40)
  running = pod.popen('stage2', TYPE, '--workdir=gs://b/runs')
  running.stdout.close()
  assert 'stage2 is finished' in running.communicate(timeout=120)[1]
  (copy,) = pod.state.glob('pod1/stage2-*.log')
  assert steps(copy.read_text()) == list(range(1, 41))


def test_switches_of_the_environment_say_yes_or_no(pod):
  pod.stage(QWENVL_POD_DELETE_AFTER='no')
  assert not pod.calls('delete')
  assert 'yes or no' in pod.stage(QWENVL_POD_DELETE_AFTER='off', status=2).err
  pod.stage(QWENVL_POD_DELETE_AFTER='yes')
  assert pod.calls('delete')


def test_another_type_gets_its_own_software(pod):
  pod.run('up', TYPE)
  pod.run('down', '--yes')
  printed = pod.run('up', '--type=v6e-8', '--dry-run').out
  assert '--runtime-version=v2-alpha-tpuv6e' in printed


def test_a_gcloud_that_hangs_is_given_up(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'launch')
  from pod import cloud

  # What it started holds its output open.
  began = time.monotonic()
  answer = cloud.run(['sh', '-c', 'echo said; sleep 30 & sleep 30'], 0.2)
  assert time.monotonic() - began < 20
  assert (answer.status, answer.out) == (124, 'said\n')
  assert 'did not answer within 0.2 s' in answer.err


def test_help(pod):
  for arguments in ('--help',), ('stage2', '-h'):
    out = pod.run(*arguments).out
    assert 'examples:' in out and '--dry-run' in out


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
    'QWENVL_CONFIG_PACKAGES': 'standin',
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
