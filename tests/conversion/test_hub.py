"""Hub ids, without a network."""

import sys
import types

import pytest

from qwenvl_jax.conversion.hub import local_folder
from qwenvl_jax.errors import CheckpointError

ID = 'Qwen/Qwen-VL-Chat'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def hub(monkeypatch, download):
  module = types.ModuleType('huggingface_hub')
  module.snapshot_download = download
  monkeypatch.setitem(sys.modules, 'huggingface_hub', module)


def test_a_folder_goes_first(tmp_path):
  (tmp_path / ID).mkdir(parents=True)
  assert local_folder(ID).is_dir()


def test_an_id_is_downloaded(tmp_path, monkeypatch):
  asked = []

  def download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(tmp_path)

  hub(monkeypatch, download)
  assert local_folder(ID) == tmp_path
  ((name, patterns),) = asked
  assert name == ID
  assert {'*.safetensors', '*.bin', '*.tiktoken', '*.json'} <= set(patterns)


def test_download_that_fails(monkeypatch):
  def download(*_, **__):
    raise OSError('no route to host\nand a page of advice')

  hub(monkeypatch, download)
  with pytest.raises(
    CheckpointError, match='from the hub: no route to host; .*network'
  ):
    local_folder(ID)


def test_without_huggingface_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(CheckpointError, match=r'qwenvl_jax\[hub\]'):
    local_folder(ID)


@pytest.mark.parametrize('text', ['Qwen-VL', 'a/b/c', './x/y', '/x/y', 'a b/c'])
def test_neither_folder_nor_id(text):
  with pytest.raises(CheckpointError, match='and is no hub id either'):
    local_folder(text)
