"""From sources to batches: shuffled, mixed, sliced by process, resumable.

Everything random is a function of the seed and of what came before, so that an
iterator set to a saved state goes on exactly as if it had never stopped.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from qwenvl_jax import image
from qwenvl_jax.data import packing, patches
from qwenvl_jax.data.batches import Batches, State
from qwenvl_jax.data.packing import Row, RowStats
from qwenvl_jax.data.packing_stream import Group, RowMaker
from qwenvl_jax.data.record_errors import ErrorBudget
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer

# What a pipeline's numbers are at least.
_LEAST = {
  'batch_size': 1,
  'sequence_length': 1,
  'image_size': 1,
  'image_tokens': 1,
  'image_slots': 0,
  'grid': 1,
  'prefetch': 0,
  'workers': 0,
}

# Where rows hold one sample each: streams for each row of a batch, so that most
# numbers of workers divide them; and of batches beyond 1,024 rows.
_STREAMS_A_ROW = 48, 6


@dataclasses.dataclass(frozen=True)
class Stream:
  """Records and what to make of them.

  Attributes:
    source: has `open()`, as `sources.Scenes`.
    tasks: makes the samples of a row, as `tasks.Questions`.
    weight: relative to the other streams: share of rows, or if rows are packed,
      share of examples between groups and of records within one.
    group: streams of one group fill packed rows together.
    name: of the source in counts and messages; '' for its own.
  """

  source: Any
  tasks: Any
  weight: float = 1.0
  group: str = ''
  name: str = ''

  @property
  def label(self) -> str:
    own = getattr(self.source, 'name', type(self.source).__name__)
    return self.name or own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
  """Batches of rows of text and images.

  Attributes:
    streams: what rows are made of.
    vocabulary: a `.tiktoken` file, or None for the released one.
    sequence_length: T, tokens in a row.
    image_size: R, side of the square that images are squashed to.
    image_tokens: Q, ids in an image span (the adapter's queries).
    image_slots: I, images in a row.
    batch_size: B, rows in a batch over all processes.
    length_alpha: weight of an answer token is n**-alpha, n the answer's tokens.
    seed: of shuffling and of all choices.
    prefetch: rows made ahead by a thread.
    workers: processes that make rows; 0 makes them here.
    packer: None gives every record a row of its own, padded, streams mixed by
      rows; else rows are filled by as many samples of a group as fit.
    limit: share of bad records at which the run stops.
  """

  streams: Sequence[Stream]
  vocabulary: str | os.PathLike | None = None
  sequence_length: int = 512
  image_size: int = 112
  image_tokens: int = 64
  image_slots: int = 1
  batch_size: int = 16
  length_alpha: float = 0.0
  seed: int = 0
  prefetch: int = 32
  workers: int = 0
  packer: packing.Packer | None = None
  limit: ErrorBudget = ErrorBudget()

  @property
  def shape(self) -> packing.RowShape:
    """Of its rows."""
    return packing.RowShape(
      self.sequence_length, self.image_slots, self.image_size, self.image_tokens
    )

  def iterator(self, process_index: int = 0, process_count: int = 1) -> Batches:
    """Endless batches: a dict with the fields of `Batch`, NumPy, B first.

    The batches of a run depend on the seed, not on the number of processes or
    workers; `get_state` and `set_state` of the iterator are exact.

    Args:
      process_index: which of the processes this is.
      process_count: every process gets its own rows, batch_size divided by
        process_count of them.

    Raises:
      ConfigError: streams or batch size that cannot be run as written.
      DataError: a source or the vocabulary is missing.
    """
    _check_split(self, process_count)
    start = self._starter(process_index, process_count)
    return Batches(start, self.batch_size, process_count, self.limit)

  def rows(self) -> Iterator[Row]:
    """Endless rows, as batches are made of."""
    _check_split(self, 1)
    return self._starter(0, 1)({'row': 0, 'shards': {}})

  def _starter(self, process_index, process_count):
    """Returns a function from a state to the rows of a process."""
    if not self.streams:
      raise ConfigError('Pipeline.streams is empty; name at least one Stream')
    for stream in self.streams:
      if not is_weight(stream.weight):
        raise ConfigError(
          f'Stream.weight={stream.weight!r} of {stream.label} is no number '
          'above 0'
        )
    tokenizer = Tokenizer(self.vocabulary)
    items, sources = [], _opened(self.streams)
    for number, stream in enumerate(self.streams):
      source = ErrorCatchingSource(sources[number], stream.label)
      to_item = packing.ToPackItem(
        self.shape,
        tokenizer,
        source,
        stream.tasks,
        stream.label,
        self.length_alpha,
        decode=self.packer is None,
      )
      seed = self.seed * 1000 + number
      items.append(_endless(source, seed).random_map(to_item, seed=seed))
    # Any number of processes that divides the batch will do.
    alone = self.batch_size * _STREAMS_A_ROW[self.batch_size > 1024]
    maker = RowMaker(
      groups=_groups(self.streams, items, self.packer),
      shape=self.shape,
      packer=self.packer or packing.Packer(shards=alone, pool=1),
      single=self.packer is None,
      seed=self.seed,
      limit=self.limit,
      prefetch=self.prefetch,
      workers=self.workers,
      pad_id=tokenizer.eod_id,
    )
    return functools.partial(maker.rows, process_index, process_count)


def is_weight(value: Any) -> bool:
  """Returns whether a value is a finite number above 0."""
  return isinstance(value, (int, float)) and 0 < value < math.inf


def _opened(streams) -> list[Sequence[Any]]:
  """The streams' records; one error names all that are not there."""
  found, missing = [], []
  for stream in streams:
    try:
      found.append(stream.source.open())
    except DataError as error:
      missing.append(str(error))
  if missing:
    more = f' (and {len(missing) - 1} more of {len(streams)} sources)'
    raise DataError(missing[0] + (more if missing[1:] else ''))
  return found


def _groups(streams, items, packer) -> list[Group]:
  """Returns the groups of a mixture; all are one if rows hold one item each."""
  members = {}
  for number, stream in enumerate(streams):
    members.setdefault(stream.group if packer else '', []).append(number)
  groups = []
  for name, numbers in members.items():
    weights = [float(streams[n].weight) for n in numbers]
    mixed = items[numbers[0]]
    if len(numbers) > 1:
      mixed = grain.MapDataset.mix([items[n] for n in numbers], weights)
    groups.append(Group(name, sum(weights), mixed))
  return groups


@dataclasses.dataclass(frozen=True)
class ErrorCatchingSource:
  """A source whose bad records are errors in the place of records."""

  source: Sequence[Any]
  label: str

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int):
    try:
      return self.source[index]
    except BadRecordError as error:
      return error

  def __repr__(self) -> str:
    return self.label


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionPipeline:
  """Batches of pictures with a label for each patch.

  Attributes:
    source: scenes, as `sources.Scenes`.
    image_size: R, side of the square that images are squashed to.
    grid: G, patches on a side.
    batch_size: B, pictures in a batch over all processes.
    seed: of shuffling.
    prefetch: pictures made ahead by a thread.
    workers: processes that make them; 0 makes them here.
  """

  source: Any
  image_size: int = 112
  grid: int = 8
  batch_size: int = 32
  seed: int = 0
  prefetch: int = 64
  workers: int = 0

  def iterator(self, process_index: int = 0, process_count: int = 1) -> Batches:
    """Endless batches.

    {'pixels': [B,R,R,3] uint8, 'patch_labels': [B,G,G] int32, 'patch_boxes':
    [B,G,G,4] float32}, see `patches.patch_targets`.
    """
    _check_split(self, process_count)
    scenes = _endless(self.source.open(), self.seed).map(self._row)

    def rows(state: State) -> Iterator[Row]:
      first = state['row'] + process_index
      mine = scenes[first::process_count].to_iter_dataset(
        # One thread: decoding holds Python's lock nearly all the time.
        grain.ReadOptions(
          num_threads=min(self.prefetch, 1), prefetch_buffer_size=self.prefetch
        )
      )
      if self.workers:
        # Rows, not batches: those would depend on the number of workers.
        options = grain.MultiprocessingOptions(num_workers=self.workers)
        mine = mine.mp_prefetch(options)
      return iter(mine)

    return Batches(rows, self.batch_size, process_count)

  def _row(self, scene) -> Row:
    labels, boxes = patches.patch_targets(scene, self.grid)
    arrays = {
      'pixels': image.pixels(scene.image, self.image_size, scene.id),
      'patch_labels': labels,
      'patch_boxes': boxes,
    }
    return Row(arrays, RowStats())


def _endless(source, seed: int) -> grain.MapDataset:
  if not len(source):
    raise ConfigError(f'{source} holds no records')
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def _check_split(config, process_count) -> None:
  name = type(config).__name__
  for key, least in _LEAST.items():
    value = getattr(config, key, least)
    if not isinstance(value, int) or value < least:
      raise ConfigError(
        f'{name}.{key}={value!r} must be a whole number, at least {least}'
      )
  if config.batch_size % process_count:
    raise ConfigError(
      f'{name}.batch_size={config.batch_size} cannot be '
      f'split over {process_count} processes; choose a multiple'
    )
  if config.workers:
    from absl import flags

    # Worker processes read absl's flags, which a library cannot expect parsed.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
