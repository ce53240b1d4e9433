"""The same code and environment on all workers."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile

from pod.cloud import INSTALLING, Answer, Cloud, is_lost
from pod.create import RetryLater
from pod.log import PodError, relay, say
from pod.settings import ROOT

# What TPU VMs install of the project, and more for some programs.
_EXTRAS = 'tpu,gcs'
_MORE = {'eval': ',eval', 'serve': ',serve'}


def _git(*words: str, **environment: str) -> str:
  done = subprocess.run(
    ['git', '-C', ROOT, *words],
    env={**os.environ, **environment},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    errors='replace',
  )
  if done.returncode:
    relay(done.stderr)
    raise PodError(
      f'git {words[0]} failed in {ROOT}',
      'git says which files belong to the project: clone it, or git init, add '
      'and commit',
    )
  return done.stdout.rstrip('\n')


def install_everywhere(cloud: Cloud, name: str = '') -> None:
  """Brings files as they are now, committed or not, without the tests.

  Args:
    cloud: of the TPU.
    name: of the stage that will run.

  Raises:
    RetryLater: the TPU went away.
  """
  extras = _EXTRAS + _MORE.get(name, '')
  if '--demo' in cloud.settings.extra:
    extras += ',demo'
  with tempfile.TemporaryDirectory() as scratch:
    # An index and new objects of their own: the repository stays as it is.
    objects = '--git-path', 'objects'
    git = functools.partial(
      _git,
      GIT_INDEX_FILE=f'{scratch}/index',
      GIT_OBJECT_DIRECTORY=scratch,
      GIT_ALTERNATE_OBJECT_DIRECTORIES=_git(
        'rev-parse', '--path-format=absolute', *objects
      ),
    )
    git('read-tree', 'HEAD')
    git('add', '--all')
    tree = git('write-tree')
    archive = os.path.join(cloud.settings.folder, f'qwenvl_jax-{tree}.tar.gz')
    say(
      f'code: commit {_git("rev-parse", "--short", "HEAD")}, tree {tree[:12]}'
    )
    changed = _git('status', '--short').splitlines()
    if changed:
      say('WITH CHANGES THAT ARE NOT COMMITTED:', *changed[:12])
    answer = cloud.on_workers('all', 'cat qwenvl_jax/installed || echo nothing')
    if answer.status:
      not_reached(cloud, answer, 'the workers cannot be reached')
    if set(answer.out.splitlines()) == {f'{tree} {extras}'}:
      say('installed already on all workers')
      return
    size = ''
    if not cloud.dry:
      os.makedirs(cloud.settings.folder, exist_ok=True)
      files = '--', '.', ':(exclude)tests'
      git('archive', '--format=tar.gz', f'--output={archive}', tree, *files)
      size = f' ({os.path.getsize(archive) / 2**20:.1f} MiB)'
  try:
    say(f'copying it to all workers{size}')
    answer = cloud.copy_to_workers(archive)
  finally:
    with contextlib.suppress(OSError):
      os.unlink(archive)
  if answer.status:
    not_reached(cloud, answer, 'copying to the workers failed')
  say('installing on all workers (some minutes)')
  file = os.path.basename(archive)
  answer = cloud.on_workers(
    'all',
    'rm -rf qwenvl_jax/new && mkdir -p qwenvl_jax/new && '
    f'tar -xzf {file} -C qwenvl_jax/new && rm {file} && '
    f'python3 qwenvl_jax/new/launch/pod/worker.py install {tree} {extras}',
    INSTALLING,
  )
  if answer.status:
    relay(answer.out)
    failed = re.findall(r'^worker ([0-9?]+): FAILED', answer.out, re.MULTILINE)
    numbers = ' '.join(sorted(set(failed), key=lambda x: (len(x), x)))
    not_reached(
      cloud,
      answer,
      f'the installation failed on worker(s) {numbers}, see above',
    )
  if not cloud.dry:
    count = len(re.findall(r': ready$', answer.out, re.MULTILINE))
    say(f'installed on {count} worker(s)')


def not_reached(cloud: Cloud, answer: Answer, message: str) -> None:
  """Raises `RetryLater` if the TPU is gone, else `PodError`."""
  state = cloud.tpu_state()
  if is_lost(state):
    say(f'TPU {cloud.settings.tpu} is {state}')
    raise RetryLater('preempted')
  cloud.explain(answer.err)
  raise PodError(message)
