"""A data set of one's own: a part held out, and steps of whole epochs."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse.csgraph

from qwenvl_jax import buckets
from qwenvl_jax.data import formats, mixture, sharded_job, storage
from qwenvl_jax.data.pipeline import Stream, is_weight
from qwenvl_jax.data.records import Record
from qwenvl_jax.data.shards import picture_digests
from qwenvl_jax.data.sources import Prepared, RecordSequence, data_path
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

PARTS = ('train', 'heldout')


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a prepared data set: what is trained on, or what is held out.

  No picture is in both: all records of a picture are held out, or none. Which
  are depends on the number of records and on who shares pictures alone.

  Attributes:
    name: of the data set.
    part: one of `PARTS`.
    heldout: share of the records that is held out, at least one; 0 for none.
      As near to it as pictures with several records allow.
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

  def open(self) -> RecordSequence:
    """The records.

    Raises:
      DataError: not prepared, or too few to hold some out.
    """
    prepared = Prepared(self.name, self.split, self.data_dir)
    records = prepared.open()
    count = len(records)
    groups = _groups(prepared, _version(prepared), bool(self.heldout))
    indices = self.indices(groups)
    none = 'set HELDOUT=0 and TrainConfig.heldout=None to hold none out'
    if not self.heldout and self.part == 'heldout':
      raise DataError(f'{self.name}: own.Part.heldout=0 leaves nothing: {none}')
    if not len(indices):
      alike = ' that share pictures' if count > 1 else ''
      raise DataError(
        f'{self.name} has {count} record(s){alike}, so that {self.part} is '
        f'empty: add some, or {none}'
      )
    return dataclasses.replace(records, chosen=indices)

  def indices(self, groups: np.ndarray) -> np.ndarray:
    """Which records are of this part.

    Args:
      groups: [N] int, equal for records that are not parted.
    """
    count = len(groups)
    order = np.random.default_rng(0).permutation(count)
    held = max(1, round(count * self.heldout)) if self.heldout else 0
    sizes = np.bincount(groups)
    taken = np.zeros(len(sizes), bool)
    for group in groups[order]:
      if not held:
        break
      if not taken[group] and sizes[group] <= held:
        taken[group] = True
        held -= sizes[group]
    if self.heldout and not taken.any():
      taken[min(groups, key=lambda group: sizes[group])] = True
    return np.flatnonzero(taken[groups] == (self.part == 'heldout'))


def _version(prepared: Prepared) -> tuple:
  """Changes where a data set is prepared anew."""
  folder = storage.folder(data_path(prepared.data_dir), prepared.name)
  count = len(storage.split_lengths(folder)[prepared.split])
  names = (
    storage.shard_name(prepared.name, prepared.split, index, count)
    for index in range(count)
  )
  return tuple(buckets.version(folder / name) for name in names)


@functools.lru_cache(maxsize=8)
def _groups(prepared: Prepared, version: tuple, by_picture: bool) -> np.ndarray:
  """Numbers records: alike if they show the same pictures, or through others.

  Args:
    prepared: the records, all of which are read if it was prepared by a version
      of this package that noted no digests.
    version: of the records, so that they are grouped once in a process.
    by_picture: else, each is alone.
  """
  count = len(prepared.open())
  if not by_picture:
    return np.arange(count)
  folder = storage.folder(data_path(prepared.data_dir), prepared.name)
  try:
    digests = sharded_job.notes(
      folder, prepared.name, prepared.split, 'pictures'
    )
  except DataError:
    digests = _digests(prepared.open())
  numbers, ones = {}, []
  for record, shown in enumerate(digests):
    for digest in shown:
      ones.append((record, count + numbers.setdefault(digest, len(numbers))))
  nodes = count + len(numbers)
  edges = np.array(ones, np.int64).reshape(-1, 2).T
  graph = scipy.sparse.coo_array((np.ones(len(ones)), edges), (nodes, nodes))
  _, groups = scipy.sparse.csgraph.connected_components(graph, directed=False)
  return groups[:count]


def _digests(records: Sequence[Record]) -> Iterator[list[str]]:
  for index in range(len(records)):
    try:
      yield picture_digests(records[index])
    except BadRecordError:  # Told where it is trained on.
      yield []


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
