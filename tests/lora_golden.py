"""What PEFT computes on the golden model, and the model with its adapters."""

import functools
import json
from pathlib import Path

import golden
import numpy as np

from qwenvl_jax.conversion import adapters
from qwenvl_jax.conversion.low_rank import LowRank

FOLDER = Path(__file__).parent / 'goldens' / 'lora'
NAMES = ('chat', 'base')


@functools.cache
def expected() -> dict[str, np.ndarray]:
  with np.load(FOLDER / 'expected.npz') as arrays:
    return dict(arrays)


@functools.cache
def adapter(name: str) -> LowRank:
  return adapters.open_adapter(FOLDER / name, golden.FOLDER, golden.config())


def read(name: str, file: str) -> dict:
  return json.loads((FOLDER / name / file).read_text())
