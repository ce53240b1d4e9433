"""The golden model, and a tiny chat checkpoint that recites one answer."""

from typing import Any, NamedTuple

import golden as golden_files
import numpy as np
import pytest
import reciter

from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.model.config import (
  QwenVLConfig,
)


class Golden(NamedTuple):
  """The golden checkpoint and the arrays that PyTorch computed with it."""

  config: QwenVLConfig
  params: Any
  expected: Any

  def prompt(self, case):
    """(ids [T], pixels [I,R,R,3]) of a `generate/` case."""
    ids = self.expected[f'generate/{case}/ids'].reshape(-1)
    return ids.tolist(), self.images(ids)

  def images(self, ids):
    """Pixels [I,R,R,3] that a row of golden ids names, None for none."""
    starts, pixels = golden_files.spans(np.asarray(ids))
    return pixels if starts else None

  def new(self, case):
    return self.expected[f'generate/{case}/new'].reshape(-1).tolist()


@pytest.fixture(scope='session')
def golden():
  return Golden(
    golden_files.config(), golden_files.params(), golden_files.expected()
  )


@pytest.fixture(scope='session')
def golden_engine(golden):
  """Room for all goldens; two searches of three or four beams at a time."""
  sizes = EngineConfig(slots=8, max_len=1024, chunk=512)
  return Engine(golden.config, golden.params, sizes)


@pytest.fixture(scope='session')
def recited():
  return reciter.ANSWER


@pytest.fixture(scope='session')
def chat_checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp('chat') / 'checkpoint'
  reciter.save(folder)
  return folder
