"""From sources to batches: shuffled, mixed, sliced by process, resumable.

Everything random is a function of the seed and of how many rows came before,
so an iterator set to a saved state goes on exactly as if it had never stopped.
"""

import dataclasses
import functools
import logging
import random
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from qwenvl_jax.data import image, packing, patches
from qwenvl_jax.data.examples import Sample, encode_sample
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text.tokenizer import Tokenizer

# Records that are tried until one allows a question.
_TRIES = 100


@dataclasses.dataclass(frozen=True)
class Stream:
  """Records and what to make of them.

  Attributes:
    source: has `open()`, as `sources.Scenes`.
    tasks: makes the samples of a row, as `tasks.Questions`.
    weight: share of rows, relative to the other streams.
  """

  source: Any
  tasks: Any
  weight: float = 1.0


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
  """

  streams: Sequence[Stream]
  vocabulary: str | None = None
  sequence_length: int = 512
  image_size: int = 112
  image_tokens: int = 64
  image_slots: int = 1
  batch_size: int = 16
  length_alpha: float = 0.0
  seed: int = 0
  prefetch: int = 32
  workers: int = 0

  def iterator(
    self, process_index: int = 0, process_count: int = 1
  ) -> grain.DatasetIterator:
    """Endless batches: a dict with the fields of `Batch`, NumPy, B first.

    `get_state` and `set_state` of the iterator are exact.

    Args:
      process_index: which of the processes this is.
      process_count: every process gets its own rows, batch_size divided by
        process_count of them.

    Raises:
      ConfigError: streams or batch size that cannot be run as written.
      DataError: a source or the vocabulary is missing.
    """
    if not self.streams:
      raise ConfigError('Pipeline.streams is empty; name at least one Stream')
    tokenizer = Tokenizer(self.vocabulary)
    rows = []
    for number, stream in enumerate(self.streams):
      source = stream.source.open()
      maker = RowMaker(self, tokenizer, source, stream.tasks)
      seed = self.seed * 1000 + number
      rows.append(_endless(source, seed).random_map(maker, seed=seed))
    weights = [float(stream.weight) for stream in self.streams]
    mixed = rows[0]
    if len(rows) > 1:
      mixed = grain.MapDataset.mix(rows, weights)
    return _batches(self, mixed, process_index, process_count)


@dataclasses.dataclass(frozen=True)
class RowMaker(grain.transforms.RandomMap):
  """Makes the row of a record; a function of the record and the generator."""

  pipeline: Pipeline
  tokenizer: Tokenizer
  source: Sequence[Any]
  tasks: Any

  def random_map(self, element, rng: np.random.Generator):
    # Python's generator chooses from short lists many times faster.
    choose = random.Random(int(rng.integers(1 << 62)))
    return self.row(element, choose).arrays

  def samples(self, record, rng: random.Random) -> list[Sample]:
    """The samples of a record, or of another if it allows no question."""

    def another():
      return self.source[rng.randrange(len(self.source))]

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

  def iterator(
    self, process_index: int = 0, process_count: int = 1
  ) -> grain.DatasetIterator:
    """Endless batches.

    {'pixels': [B,R,R,3] uint8, 'patch_labels': [B,G,G] int32, 'patch_boxes':
    [B,G,G,4] float32}, see `patches.patch_targets`.
    """
    scenes = _endless(self.source.open(), self.seed).map(self.example)
    return _batches(self, scenes, process_index, process_count)

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


def _batches(config, rows, process_index, process_count):
  if config.batch_size % process_count:
    raise ConfigError(
      f'{type(config).__name__}.batch_size={config.batch_size} cannot be '
      f'split over {process_count} processes; choose a multiple'
    )
  # One thread: decoding and packing hold Python's lock nearly all the time.
  reading = grain.ReadOptions(
    num_threads=1, prefetch_buffer_size=config.prefetch
  )
  if not config.prefetch:
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  batches = (
    rows[process_index::process_count]
    .to_iter_dataset(reading)
    .batch(config.batch_size // process_count, drop_remainder=True)
  )
  if config.workers:
    from absl import flags

    # Worker processes read absl's flags, which a library cannot expect parsed.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=config.workers)
    batches = batches.mp_prefetch(options)
  return iter(batches)
