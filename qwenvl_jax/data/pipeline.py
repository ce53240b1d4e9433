"""From sources to batches: shuffled, mixed, sliced by process, resumable.

Everything random is a function of the seed and of how many rows came before,
so an iterator set to a saved state goes on exactly as if it had never stopped.
"""

import dataclasses
import functools
import json
import logging
import os
import random
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from qwenvl_jax import image
from qwenvl_jax.data import packed, packing, patches
from qwenvl_jax.data.bad import Counts, Limit
from qwenvl_jax.data.batches import NOTE, Batches
from qwenvl_jax.data.examples import Sample, encode_sample
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer

# Records that are tried until one allows a question.
_TRIES = 100


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
    packer: None gives every record a row of its own, padded; else rows are
      filled by as many samples of a group as fit, and a row is several records.
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
  packer: packed.Packer | None = None
  limit: Limit = Limit()

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

  def rows(self):
    """Endless rows, as batches are made of: the fields of `Batch` without B.

    Each with a note (`batches.NOTE`) on how it was made, as JSON.
    """
    return self._starter(0, 1)({'row': 0, 'shards': {}})

  def _starter(self, process_index, process_count):
    """A function from a state to the rows of a process."""
    if not self.streams:
      raise ConfigError('Pipeline.streams is empty; name at least one Stream')
    tokenizer = Tokenizer(self.vocabulary)
    made, weights = [], [float(stream.weight) for stream in self.streams]
    sources = _opened(self.streams)
    kind = packed.UnitMaker if self.packer else RowMaker
    for number, stream in enumerate(self.streams):
      source = _Careful(sources[number], stream.label)
      maker = kind(self, tokenizer, source, stream.tasks, stream.label)
      seed = self.seed * 1000 + number
      made.append(_endless(source, seed).random_map(maker, seed=seed))
    if self.packer:
      return functools.partial(
        packed.rows,
        self,
        _groups(self.streams, made, weights),
        tokenizer.eod_id,
        process_index,
        process_count,
      )
    mixed = _mixed(made, weights)
    return lambda state: _rows(
      self, mixed, process_index, process_count, state['row']
    )


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


def _groups(streams, made, weights) -> list[packed.Group]:
  numbers = {}
  for number, stream in enumerate(streams):
    numbers.setdefault(stream.group, []).append(number)
  return [
    packed.Group(
      name,
      sum(weights[n] for n in members),
      _mixed([made[n] for n in members], [weights[n] for n in members]),
    )
    for name, members in numbers.items()
  ]


def _mixed(datasets, weights):
  if len(datasets) == 1:
    return datasets[0]
  return grain.MapDataset.mix(datasets, weights)


@dataclasses.dataclass(frozen=True)
class _Careful:
  """A source whose bad records are errors to look at, not to stumble over."""

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


@dataclasses.dataclass(frozen=True)
class RowMaker(grain.transforms.RandomMap):
  """Makes the row of a record; a function of the record and the generator."""

  pipeline: Pipeline
  tokenizer: Tokenizer
  source: Sequence[Any]
  tasks: Any
  label: str = ''

  def __repr__(self) -> str:
    # Grain asks for it with every record: it must not list the mixture.
    return self.label

  def random_map(self, element, rng: np.random.Generator):
    # Python's generator chooses from short lists many times faster.
    choose = random.Random(int(rng.integers(1 << 62)))
    counts = Counts()
    error = None
    for _ in range(_TRIES):
      counts.seen(self.label)
      try:
        if isinstance(element, BadRecordError):
          raise element
        arrays = self.row(element, choose).arrays
        return {**arrays, NOTE: json.dumps({'counts': counts.as_dict()})}
      except BadRecordError as bad:
        error = bad
        counts.dropped(self.label, bad.reason)
        element = self.source[choose.randrange(len(self.source))]
    raise DataError(
      f'{_TRIES} records of {self.label} in turn had to be dropped, the last '
      f'because: {error}'
    ) from error

  def samples(self, record, rng: random.Random) -> list[Sample]:
    """The samples of a record, or of another if it allows no question."""

    def another():
      found = self.source[rng.randrange(len(self.source))]
      if isinstance(found, BadRecordError):
        raise found
      return found

    for _ in range(_TRIES):
      samples = self.tasks(record, rng, another)
      if samples:
        return samples
      first, record = record.id, another()
    raise ConfigError(
      f'none of {_TRIES} records (the last was {first}) allows any of the '
      f'questions of {self.tasks}; name kinds that fit the data'
    )

  def row(self, record, rng: random.Random) -> packing.Row:
    """The row of a record."""
    config = self.pipeline
    samples = self.samples(record, rng)
    encoded = [
      encode_sample(
        sample,
        self.tokenizer,
        config.image_tokens,
        length_alpha=config.length_alpha,
        max_length=config.sequence_length,
      )
      for sample in samples
    ]
    row = packing.make_row(
      packing.fill(encoded, config.sequence_length, config.image_slots),
      config.sequence_length,
      config.image_slots,
      config.image_size,
      self.tokenizer.eod_id,
    )
    if row.truncated:
      _warn_truncated(config.sequence_length)
    return row


@functools.lru_cache(maxsize=8)
def _warn_truncated(length: int) -> None:
  """Once for each length: rows are many."""
  logging.warning(
    'text longer than sequence_length=%d is cut at its end; raise it if '
    'answers should be learned whole',
    length,
  )


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
    scenes = _endless(self.source.open(), self.seed).map(self.example)
    return Batches(
      lambda state: _rows(
        self, scenes, process_index, process_count, state['row']
      ),
      self.batch_size,
      process_count,
    )

  def example(self, scene) -> dict[str, np.ndarray]:
    """One picture and its labels."""
    labels, boxes = patches.patch_targets(scene, self.grid)
    return {
      'pixels': image.pixels(scene.image, self.image_size, scene.id),
      'patch_labels': labels,
      'patch_boxes': boxes,
    }


def _endless(source, seed: int) -> grain.MapDataset:
  if not len(source):
    raise ConfigError(f'{source} holds no records')
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def _check_split(config, process_count) -> None:
  if config.batch_size % process_count:
    raise ConfigError(
      f'{type(config).__name__}.batch_size={config.batch_size} cannot be '
      f'split over {process_count} processes; choose a multiple'
    )
  if config.workers:
    from absl import flags

    # Worker processes read absl's flags, which a library cannot expect parsed.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()


def _rows(config, rows, process_index, process_count, first):
  """A process's share of rows from row `first` of the run on."""
  # One thread: decoding and packing hold Python's lock nearly all the time.
  reading = grain.ReadOptions(
    num_threads=1, prefetch_buffer_size=config.prefetch
  )
  if not config.prefetch:
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  mine = rows[first + process_index :: process_count].to_iter_dataset(reading)
  if config.workers:
    # Rows, not batches: those would depend on the number of workers.
    options = grain.MultiprocessingOptions(num_workers=config.workers)
    mine = mine.mp_prefetch(options)
  return iter(mine)
