"""The golden checkpoint and its batches, for every test that compares."""

import base64
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from qwenvl_jax.batch import NO_IMAGE, Batch, text_batch
from qwenvl_jax.conversion import checkpoint_io, layout
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.qwen_vl import QwenVL

FOLDER = Path(__file__).parent / 'goldens' / 'tiny'

# Of the goldens' README: activations and logits, float32 on a CPU.
ATOL = 2e-4


@functools.cache
def config() -> QwenVLConfig:
  return checkpoint_io.read_config(FOLDER).replace(
    dtype='float32', param_dtype='float32', remat='none'
  )


@functools.cache
def params() -> dict:
  return checkpoint_io.read_params(FOLDER, config(), 'float32')


@functools.cache
def expected() -> dict[str, np.ndarray]:
  with np.load(FOLDER / 'expected.npz') as arrays:
    return dict(arrays)


@functools.cache
def grad_norms() -> dict[str, float]:
  return json.loads((FOLDER / 'grad_norms.json').read_text())


def vocabulary(ranks: int = 286) -> str:
  """A `.tiktoken` file: all bytes, then pairs; the golden model's has 286."""
  tokens = [bytes([i]) for i in range(256)]
  tokens += [b'a%c' % i for i in range(ranks - 256)]
  lines = (base64.b64encode(x).decode() for x in tokens)
  return ''.join(f'{line} {i}\n' for i, line in enumerate(lines))


def save_params(folder: Path, tree: dict) -> None:
  """Saves parameters in memory as a training run does."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save((folder / 'params').absolute(), tree)


def released_tensors(table, tree: dict) -> dict[str, np.ndarray]:
  """The tensors of a parameter tree by their released names."""
  leaves, found = dict(layout.flatten(tree)), {}
  assert leaves.keys() == {path for rule in table for path in rule.paths}
  for rule in table:
    for layer, name in enumerate(rule.released_names()):
      arrays = [np.asarray(leaves[path]) for path in rule.paths]
      if rule.layers is not None:
        arrays = [array[layer] for array in arrays]
      found[name] = np.ascontiguousarray(rule.to_released(*arrays))
  return found


def model() -> QwenVL:
  return QwenVL(config())


def pixels(name: str) -> np.ndarray:
  """[112,112,3] of 'wide.png' or 'tall.png'."""
  return expected()[f'pixels/{name}'].transpose(1, 2, 0)


def spans(row) -> tuple[list[int], np.ndarray]:
  """Starts and pixels of the images that a row of golden ids names."""
  starts = [int(i) + 1 for i in np.flatnonzero(row == 500)]
  names = [
    bytes(int(x) for x in row[s : s + 256] if x < 256).decode() for s in starts
  ]
  if not names:
    return [], np.zeros((0, 112, 112, 3), np.float32)
  return starts, np.stack([pixels(name) for name in names])


def batch(ids: np.ndarray, mask=None, slots: int | None = None) -> Batch:
  """Golden ids [B,T] as a batch, with the images that they name."""
  rows = [spans(row) for row in ids]
  slots = max(len(s) for s, _ in rows) if slots is None else slots
  where = np.full((len(ids), slots), NO_IMAGE, np.int32)
  images = np.zeros((len(ids), slots, 112, 112, 3), np.float32)
  for row, (starts, values) in enumerate(rows):
    where[row, : len(starts)] = starts
    images[row, : len(starts)] = values
  return dataclasses.replace(
    text_batch(ids, mask), pixels=images, image_starts=where
  )


def train_batch() -> Batch:
  """The golden training batch with its labels as targets and weights."""
  e = expected()
  labels = np.pad(
    e['train/labels'][:, 1:], ((0, 0), (0, 1)), constant_values=-100
  )
  return dataclasses.replace(
    batch(e['train/ids'], e['train/mask']),
    targets=np.maximum(labels, 0).astype(np.int32),
    loss_weights=(labels != -100).astype(np.float32),
  )


@functools.cache
def apply(inference: bool):
  """Jitted (params, batch) -> logits."""
  return jax.jit(
    lambda params, batch: model().apply(
      {'params': params}, batch, inference=inference
    )
  )
