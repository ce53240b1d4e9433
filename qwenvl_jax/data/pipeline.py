"""From sources to batches: shuffled, mixed, sliced by process, resumable.

Everything random is a function of the seed and of what came before, so that an
iterator set to a saved state goes on exactly as if it had never stopped. The
rows of a run come from a fixed number V of `PackingStream`s, whatever the
number of processes and workers: stream v makes rows v, v + V, .. of items v,
v + V, .. of every group. `packing` makes the items and the rows.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import grain.experimental

from qwenvl_jax import image
from qwenvl_jax.data import packing, patches
from qwenvl_jax.data.bad import Counts, Limit
from qwenvl_jax.data.batches import Batches, State
from qwenvl_jax.data.packing import PackItem, Row, RowStats
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer

# Streams begin with different groups; up to so many examples of a group count
# as given at the start of each.
_HEAD_START = 8

# Streams of a mixture whose rows hold one item each, at least about.
_STREAMS = 1024


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

  def rows(self) -> Iterator[Row]:
    """Endless rows, as batches are made of."""
    return self._starter(0, 1)({'row': 0, 'shards': {}})

  @property
  def shape(self) -> packing.RowShape:
    return packing.RowShape(
      self.sequence_length,
      self.image_slots,
      self.image_size,
      self.image_tokens,
    )

  def _starter(self, process_index, process_count):
    """Returns a function from a state to the rows of a process."""
    if not self.streams:
      raise ConfigError('Pipeline.streams is empty; name at least one Stream')
    tokenizer = Tokenizer(self.vocabulary)
    items, sources = [], _opened(self.streams)
    for number, stream in enumerate(self.streams):
      source = _ErrorCatchingSource(sources[number], stream.label)
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
    maker = RowMaker(
      self, _groups(self.streams, items, self.packer), tokenizer.eod_id
    )
    return functools.partial(maker.rows, process_index, process_count)


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


@dataclasses.dataclass(frozen=True)
class Group:
  """Items that fill rows together.

  Attributes:
    name: of the group.
    weight: share of examples, relative to the other groups.
    items: endless `PackItem`s, by random access.
  """

  name: str
  weight: float
  items: Any


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
class _ErrorCatchingSource:
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


class PackingStream:
  """Plans the rows of one stream, one after the other."""

  def __init__(self, number: int, maker: 'RowMaker', state: State):
    """Starts where a state says.

    Args:
      number: of the stream.
      maker: what all streams have in common.
      state: of `batches.Batches`.
    """
    self._number, self._maker = number, maker
    groups = maker.groups
    # Rows that this stream has made.
    rows = len(range(number, state['row'], maker.streams))
    start = [[rows if maker.single else 0, 0, []] for _ in groups]
    position = state['shards'].get(str(number), start)
    if len(position) != len(groups):
      raise DataError(
        f'the saved state has {len(position)} tasks, the mixture '
        f'{len(groups)}; go on with the config.gin of the run'
      )
    # Per group: items taken, examples given, (index, item) that wait.
    self._taken = [taken for taken, _, _ in position]
    self._given = [given for _, given, _ in position]
    self._pools = [
      [(index, group.items[index]) for index in waiting]
      for group, (_, _, waiting) in zip(groups, position)
    ]
    self._skipped = sum(self._taken) > rows
    rng = random.Random(f'{maker.config.seed}-{number}')
    self._head_start = [rng.random() * _HEAD_START for _ in groups]

  def plan(self) -> tuple[list[PackItem], RowStats]:
    """Returns what the next row holds, and what happened on the way."""
    maker, counts = self._maker, Counts()
    stats = RowStats(stream=self._number, streams=maker.streams)
    number = min(
      range(len(maker.groups)),
      key=lambda n: (
        (self._given[n] + self._head_start[n]) / maker.groups[n].weight
      ),
    )
    items = self._take(number, counts, stats)
    left = maker.config.sequence_length - sum(x.tokens for x in items)
    for other, group in enumerate(maker.groups):
      if group.name == maker.packer.filler and other != number:
        items += self._take(other, counts, stats, left)
    stats.group = maker.groups[number].name
    stats.counts = counts.as_dict()
    if self._skipped or not maker.single:
      waiting = [[index for index, _ in pool] for pool in self._pools]
      stats.position = list(map(list, zip(self._taken, self._given, waiting)))
    return items, stats

  def _take(self, number, counts, stats, left=None) -> list[PackItem]:
    """Takes a row's worth out of a group's pool, or what fits into the rest."""
    pool = self._pools[number]
    self._fill(number, pool, counts, stats)
    tokens = [item.tokens for _, item in pool]
    images = [item.images for _, item in pool]
    if left is None:
      shape = self._maker.shape
      positions = packing.choose(
        tokens, images, shape.length, shape.image_slots
      )
    else:
      # Nothing has to be taken: in place of the first stands an empty item.
      positions = packing.choose([0, *tokens], [0, *images], left, 0)
      positions = [x - 1 for x in positions[1:]]
    items = [pool[x][1] for x in positions]
    kept = set(positions)
    pool[:] = [x for i, x in enumerate(pool) if i not in kept]
    self._given[number] += sum(x.examples for x in items)
    return items

  def _fill(self, number, pool, counts, stats) -> None:
    maker, items = self._maker, self._maker.groups[number].items
    dropped = collections.Counter()
    while len(pool) < maker.packer.pool:
      index = self._taken[number] * maker.streams + self._number
      self._taken[number] += 1
      item = items[index]
      counts.seen(item.source)
      counts.repaired(item.source, set(item.repaired))
      if item.error is None:
        pool.append((index, item))
        continue
      self._skipped = True
      stats.drop(counts, item.source, item.error)
      dropped[item.source, item.error.reason] += 1
      if dropped.total() >= max(maker.config.limit.after, 100):
        raise _nothing_usable(maker.groups[number].name, dropped, stats)


def _nothing_usable(group: str, dropped, stats: RowStats) -> Exception:
  source, reason = key = dropped.most_common(1)[0][0]
  kind = ConfigError if reason == 'no_question' else DataError
  name = f'task {group}: ' if group else ''
  return kind(
    f'{name}{dropped.total()} records had to be dropped to fill one pool, most '
    f'for {source}: {reason} ({stats.dropped[key]}); mend or take out that '
    'source'
  )


@dataclasses.dataclass(frozen=True)
class RowMaker:
  """Makes the rows of a run.

  Attributes:
    config: of the pipeline.
    groups: what rows are made of.
    pad_id: fills rows up.
  """

  config: Pipeline
  groups: Sequence[Group]
  pad_id: int

  @property
  def single(self) -> bool:
    """Whether each row holds one item."""
    return self.config.packer is None

  @functools.cached_property
  def packer(self) -> packing.Packer:
    rows = self.config.batch_size
    alone = packing.Packer(shards=rows * max(1, _STREAMS // rows), pool=1)
    return self.config.packer or alone

  @property
  def streams(self) -> int:
    return self.packer.shards

  @functools.cached_property
  def shape(self) -> packing.RowShape:
    return self.config.shape

  def rows(self, process: int, processes: int, state: State) -> Iterator[Row]:
    """Returns a process's rows from a state on.

    Raises:
      ConfigError: streams that cannot be divided among processes and workers.
    """
    workers = max(self.config.workers, 1)
    if self.streams % (processes * workers):
      raise ConfigError(
        f'{self._shards_say()} cannot be divided among {processes} processes '
        f'of {workers} workers each; choose a multiple of '
        f'{processes * workers}. A run keeps its number of shards'
      )
    if state['shards'] and state.get('of') not in (None, 0, self.streams):
      raise ConfigError(
        f'the run was begun with {state["of"]} shards and would go on with '
        f'{self.streams}; keep Packer.shards, or Pipeline.batch_size where a '
        'row holds one sample'
      )
    # Row r of the run is of stream r mod V; a process has every so manieth.
    first = state['row'] + process
    order = [
      (first + step * processes) % self.streams
      for step in range(self.streams // processes)
    ]
    dataset = _Rows(self, order, state)
    if self.config.workers:
      options = grain.MultiprocessingOptions(num_workers=self.config.workers)
      dataset = dataset.mp_prefetch(options)
    elif self.config.prefetch and not self.packer.threads:
      dataset = grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=self.config.prefetch
      )
    return iter(dataset)

  def _shards_say(self) -> str:
    if self.single:
      return f'{self.streams} rows (of Pipeline.batch_size)'
    return f'Packer.shards={self.streams}'


class _Rows(grain.IterDataset):
  """The rows of some streams, in turn."""

  def __init__(self, maker: RowMaker, order: Sequence[int], state: State):
    super().__init__()
    self._maker, self._order, self._state = maker, list(order), state

  def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
    """Called in a worker process: which of the rows it makes."""
    del sequential_slice
    self._order = self._order[sl]

  def __iter__(self) -> grain.DatasetIterator:
    return _RowIterator(self._maker, self._order, self._state)


class _RowIterator(grain.DatasetIterator):
  """Plans rows ahead, and lets threads decode their pictures."""

  def __init__(self, maker, order, state):
    super().__init__()
    self._ahead, self._threads = collections.deque(), None
    self._ahead_of = maker.config.prefetch
    streams = [PackingStream(number, maker, state) for number in order]
    self._turns = itertools.cycle(streams)
    self._lay_out = functools.partial(
      packing.lay_out, shape=maker.shape, pad_id=maker.pad_id
    )
    if maker.packer.threads:
      self._threads = concurrent.futures.ThreadPoolExecutor(
        maker.packer.threads
      )

  def __next__(self) -> Row:
    if self._threads is None:
      return self._lay_out(*next(self._turns).plan())
    while len(self._ahead) <= self._ahead_of:
      plan = next(self._turns).plan()
      self._ahead.append(self._threads.submit(self._lay_out, *plan))
    return self._ahead.popleft().result()

  def get_state(self) -> dict[str, Any]:
    """Returns nothing: every row carries the position of its stream."""
    return {}

  def set_state(self, state) -> None:
    del state

  def close(self) -> None:
    super().close()
    if self._threads is not None:
      self._threads.shutdown(wait=False, cancel_futures=True)


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
