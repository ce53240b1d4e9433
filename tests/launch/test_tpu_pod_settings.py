"""launch/tpu_pod.sh: what is asked for, and how."""

import shlex
import shutil
import time

import pytest
from pod_support import ROOT, TYPE


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
