"""A small stand-in for data and model: fast, deterministic, resumable."""

import dataclasses
import itertools
import time

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.data.batches import Batches
from qwenvl_jax.data.packing import Row, RowStats
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.optimizer import OptimizerConfig


def small_config(**changes) -> QwenVLConfig:
  """A Qwen-VL of two layers each that trains in milliseconds."""
  sizes = {
    'vision': VisionConfig(
      image_size=28,
      patch_size=14,
      width=16,
      layers=2,
      heads=2,
      mlp_dim=32,
      position_grid=2,
    ),
    'adapter': AdapterConfig(queries=4, dim=16, heads=2),
    'decoder': DecoderConfig(
      vocab_size=32,
      dim=16,
      layers=2,
      heads=2,
      head_dim=8,
      mlp_dim=32,
      seq_length=16,
    ),
    'image_start_id': 20,
    'dtype': jnp.float32,
    'remat': 'none',
  }
  return QwenVLConfig(**{**sizes, **changes})


def rows(seed: int, count: int, length: int = 12) -> dict[str, np.ndarray]:
  """Rows of arithmetic sequences with one random picture each."""
  rng = np.random.default_rng(seed)
  start, by = rng.integers(0, 16, (2, count, 1))
  tokens = ((start + (by % 3 + 1) * np.arange(length)) % 16).astype(np.int32)
  tokens[:, 0], tokens[:, 5] = 20, 21
  weights = np.ones((count, length), np.float32)
  weights[:, :5] = 0
  weights[:, -1] = 0
  # Unequal weights, so that a mean of means would differ.
  weights[::2, 8:] = 0
  return {
    'tokens': tokens,
    'targets': np.roll(tokens, -1, axis=1),
    'loss_weights': weights,
    'positions': np.tile(np.arange(length, dtype=np.int32), (count, 1)),
    'segment_ids': np.ones((count, length), np.int32),
    'branch_ids': np.zeros((count, length), np.int32),
    'pixels': rng.integers(0, 256, (count, 1, 28, 28, 3), dtype=np.uint8),
    'image_starts': np.ones((count, 1), np.int32),
  }


@dataclasses.dataclass(frozen=True)
class Rows:
  """Endless shuffled rows, read by Grain as the real data is."""

  batch_size: int = 4
  bad_from: int | None = None
  bad_until: int | None = None
  end: int | None = None

  def iterator(self, process_index=0, process_count=1):
    def batch(index):
      made = rows(index, self.batch_size // process_count)
      if self.bad_from is not None and self.bad_from <= index < self.bad_until:
        made['loss_weights'] = made['loss_weights'] * np.nan
      return made

    dataset = grain.MapDataset.range(self.end or 1_000_000).map(batch)
    return iter(dataset.to_iter_dataset())


@dataclasses.dataclass(frozen=True)
class Line:
  """Fits a line: a model whose updates can be followed by hand."""

  config: QwenVLConfig = dataclasses.field(default_factory=small_config)

  def init(self, key):
    part = nn.with_logical_partitioning
    kernel = part(nn.initializers.normal(1.0), ('embed', 'mlp'))
    return {
      'model': {
        'kernel': kernel(key, (4, 2), jnp.float32),
        'bias': jnp.zeros((2,)),
      },
      'fixed': {'scale': jnp.ones((2,))},
    }

  def check(self, batch):
    pass

  def loss(self, params, batch):
    model = params['model']
    y = batch['x'] @ model['kernel'] + model['bias']
    error = jnp.sum((y * params['fixed']['scale'] - batch['y']) ** 2, -1)
    weight = batch['weight']
    counts = {'tokens': jnp.sum(weight > 0)}
    return jnp.sum(error * weight), jnp.sum(weight), counts


@dataclasses.dataclass(frozen=True)
class Points:
  """Endless points for `Line`, in an order that has to be resumed."""

  batch_size: int = 8
  pause: float = 0.0
  bad_from: int | None = None
  bad_until: int | None = None
  # What bad points are multiplied by.
  bad: float = np.nan
  end: int = 1_000_000

  def iterator(self, process_index=0, process_count=1):
    def batch(index):
      rng = np.random.default_rng(int(index))
      x = rng.normal(size=(self.batch_size, 4)).astype(np.float32)
      y = np.stack([x.sum(1), x[:, 0] - x[:, 1]], 1) + 1
      weight = rng.integers(0, 4, self.batch_size).astype(np.float32)
      return {
        'x': x,
        'y': y.astype(np.float32),
        'weight': weight + (index == 0),
      }

    def slow(index, made):
      time.sleep(self.pause)
      if self.bad_from is not None and self.bad_from <= index < self.bad_until:
        made['y'] = made['y'] * self.bad
      rows = self.batch_size // process_count
      mine = slice(process_index * rows, (process_index + 1) * rows)
      return {name: value[mine] for name, value in made.items()}

    dataset = grain.MapDataset.range(self.end).map_with_index(
      lambda step, value: (step, value)
    )
    dataset = dataset.seed(0).shuffle().map(lambda pair: batch(pair[1]))
    dataset = dataset.map_with_index(slow)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(1, 4)))


@dataclasses.dataclass(frozen=True)
class Numbered:
  """Points by the number of their row, read as `Pipeline` reads.

  Attributes:
    folder: where each process notes the rows that it reads.
    attempt: names its file.
    bad_from: first row whose wanted values are multiplied by `bad`.
    bad_until: the first after them.
  """

  folder: str
  attempt: int = 0
  batch_size: int = 8
  pause: float = 0.0
  bad_from: int = 0
  bad_until: int = 0
  bad: float = np.nan

  def iterator(self, process_index=0, process_count=1):
    def point(row):
      rng = np.random.default_rng(row)
      x = rng.normal(size=4).astype(np.float32)
      y = np.array([x.sum() + 1, x[0] - x[1] + 1], np.float32)
      if self.bad_from <= row < self.bad_until:
        y *= self.bad
      weight = np.float32(rng.integers(1, 4))
      arrays = {'x': x, 'y': y, 'weight': weight, 'row': np.int32(row)}
      return Row(arrays, RowStats())

    def start(state):
      first = state['row'] + process_index
      return (point(row) for row in itertools.count(first, process_count))

    file = f'{self.folder}/{self.attempt}-{process_index}'
    return _Noted(start, self, process_count, file)


class _Noted(Batches):
  def __init__(self, start, data, count, file):
    super().__init__(start, data.batch_size, count)
    self._pause = data.pause
    self._file = file

  def __next__(self):
    time.sleep(self._pause)
    batch = super().__next__()
    with open(self._file, 'a') as file:
      print(*batch['row'], file=file)
    return batch


def line_run(steps=12, data=None, optimizer=None, **changes) -> TrainConfig:
  """A run of `Line` that compiles in a second."""
  optimizer = {
    'peak': 0.1,
    'end': 0.01,
    'warmup': 2,
    'trainable': ('model/.*',),
    **(optimizer or {}),
  }
  return TrainConfig(
    objective=Line(),
    data=data or Points(),
    optimizer=OptimizerConfig(steps=steps, **optimizer),
    **changes,
  )


def keys(tree) -> list[str]:
  """Paths of all leaves of any tree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [
    jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in leaves
  ]
