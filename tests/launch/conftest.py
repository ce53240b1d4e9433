"""A checkout with a state in git, and a cloud."""

import shutil

import pytest
from pod_support import ROOT, Pod, git


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


@pytest.fixture
def pod(tmp_path, checkout):
  pod = Pod(tmp_path, checkout)
  yield pod
  pod.end()
