"""Every config file can be run as it stands."""

import pathlib

import pytest

from qwenvl_jax import configuration

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
FILES = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob('*.gin'))


def test_every_stage_has_its_file():
  assert {'stage1.gin', 'stage2.gin', 'stage3.gin'} <= set(FILES)


@pytest.mark.parametrize('file', FILES)
def test_resolves(file, tmp_path, monkeypatch):
  # Commands find configs wherever they are started.
  monkeypatch.chdir(tmp_path)
  configuration.load([file])  # Unknown names, parameters and macros fail here.
  resolved = configuration.resolved()
  # What is saved beside the checkpoints is a config file itself.
  saved = tmp_path / 'config.gin'
  saved.write_text(resolved)
  configuration.load([str(saved)])
  assert configuration.resolved() == resolved
