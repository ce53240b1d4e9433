"""launch/tpu_pod.sh: evaluation and servers."""

import pathlib
import re
import shlex
import shutil

from pod_support import ONE_HOST, TYPE


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
