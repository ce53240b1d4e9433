"""A data set of one's own: a part held out, and steps of whole epochs."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from qwenvl_jax.data import formats, mixture
from qwenvl_jax.data.pipeline import Stream, is_weight
from qwenvl_jax.data.sources import Prepared
from qwenvl_jax.errors import ConfigError, DataError

PARTS = ('train', 'heldout')


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a prepared data set: what is trained on, or what is held out.

  Which records are held out depends on their number alone.

  Attributes:
    name: of the data set.
    part: one of `PARTS`.
    heldout: share of the records that is held out, at least one; 0 for none.
    data_dir: the folder given to `prepare`; None for the default one.
    split: which of the data set's.
  """

  name: str
  part: str = 'train'
  heldout: float = 0.05
  data_dir: str | os.PathLike | None = None
  split: str = 'train'

  def __post_init__(self):
    if self.part not in PARTS:
      raise ConfigError(f'own.Part.part={self.part!r} is none of {PARTS}')
    if not 0 <= self.heldout < 1:
      raise ConfigError(f'own.Part.heldout={self.heldout} is not in [0, 1)')

  def open(self) -> 'Chosen':
    """The records.

    Raises:
      DataError: not prepared, or too few to hold some out.
    """
    records = Prepared(self.name, self.split, self.data_dir).open()
    indices = self.indices(len(records))
    if not len(indices):
      raise DataError(
        f'{self.name} has {len(records)} record(s), so that {self.part} is '
        'empty: add some, or set HELDOUT=0 to hold none out'
      )
    return Chosen(records, indices)

  def indices(self, count: int) -> np.ndarray:
    """Which of `count` records are of this part."""
    held = max(1, round(count * self.heldout)) if self.heldout else 0
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[:held] if self.part == 'heldout' else order[held:])


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Some records of a sequence."""

  records: Any
  indices: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int):
    return self.records[int(self.indices[index])]


def streams(
  source: Part, tasks: Any = None, mixed: Mapping[str, float] | None = None
) -> list[Stream]:
  """Makes the stream of a data set of one's own, and of what is mixed in.

  Args:
    source: the records.
    tasks: what to make of them; None for conversations.
    mixed: other prepared data sets of conversations, so that what the model can
      already do is practised, too: rows of each for one row of the first.

  Raises:
    ConfigError: `mixed` is not as described.
    DataError: data sets of `mixed` are not prepared; all are named.
  """
  tasks = tasks or formats.Conversations()
  own = Stream(source, tasks, name=source.name)
  if not _rows(source, mixed):
    return [own]
  table = [
    ('mixed', name, formats.Conversations(), weight)
    for name, weight in mixed.items()
  ]
  return [own, *mixture.streams(table, data_dir=source.data_dir)]


def _rows(source: Part, mixed: Mapping[str, float] | None) -> float:
  """Rows that are mixed in for a row of one's own."""
  mixed = {} if mixed is None else mixed
  if not (isinstance(mixed, Mapping) and all(map(is_weight, mixed.values()))):
    raise ConfigError(
      f'own.streams.mixed={mixed!r} (MIX) does not map data sets to rows of '
      "each for one row of your own, above 0, e.g. {'llava': 1.0}"
    )
  if source.name in mixed:
    raise ConfigError(
      f'own.streams.mixed (MIX) names {source.name}, which is DATA_SET itself'
    )
  return sum(mixed.values())


def steps(
  source: Part,
  batch_size: int,
  epochs: float,
  share: float = 1.0,
  records: int | None = None,
  mixed: Mapping[str, float] | None = None,
) -> int:
  """Counts the steps of some epochs, at least 1.

  Args:
    source: the records.
    batch_size: rows in a step, one for each record.
    epochs: how often each record is read.
    share: of these steps that is wanted.
    records: how many there are; None counts them.
    mixed: as of `streams`: the epochs of one's own records take more steps.

  Raises:
    ConfigError: `mixed` is not as `streams` takes it.
    DataError: they are not prepared.
  """
  count = len(source.open()) if records is None else records
  rows = count * (1 + _rows(source, mixed))
  return max(1, math.ceil(share * epochs * rows / batch_size))
