"""launch/tpu_pod.sh: a stage from a request for a TPU to its end."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess

import pytest
from pod_support import AWKWARD, ROOT, TYPE, executable, git, steps


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
  fake = (remote / 'python3.11').read_text()
  executable(remote / 'python3', fake)
  executable(pod.folder / 'of uv/python3.11', fake)
  for version in (11, 12, 13):
    executable(remote / f'python3.{version}', '#!/bin/sh\nexit 1\n')
  assert 'installed on 2 worker(s)' in pod.run('up', TYPE).err


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
