"""Scenes to test with: prepared once, in a folder of their own."""

import pytest

from qwenvl_jax.data import prepare, sources
from qwenvl_jax.data.records import Object, Word, scene


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
  """A data folder with the 'small' scenes and the vocabulary."""
  folder = tmp_path_factory.mktemp('data')
  prepare.scenes(folder, 'small')
  return str(folder)


@pytest.fixture(scope='session')
def small_scenes(prepared):
  """The training scenes of the prepared folder, as a source."""
  return sources.Scenes(prepared, config='small')


@pytest.fixture(scope='session')
def vocabulary(prepared):
  return sources.small_vocabulary(prepared)


@pytest.fixture
def two_apples_and_a_cat():
  """Two apples (0) left and right below, a cat (1) right above, a word."""
  return scene(
    'made/up',
    b'',
    112,
    [
      Object(1, (60, 10, 100, 40)),
      Object(0, (5, 50, 40, 90)),
      Object(0, (62, 60, 104, 100)),
    ],
    colour=0,
    words=[Word('open', ((1, 2), (20, 3), (20, 20), (1, 20)))],
  )
