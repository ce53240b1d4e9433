"""Which items become which rows of a run, whatever its number of processes.

The rows of a run come from a fixed number V of streams: stream v makes rows v,
v + V, .. of items v, v + V, .. of every group. Each process owns some streams
and each of its workers some of those, so that rows do not depend on either
number. Where a stream stands is a few integers a group: how many items it has
taken, and which of them wait in its pool.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import grain.experimental

from qwenvl_jax.data import packing
from qwenvl_jax.data.batches import State
from qwenvl_jax.data.packing import PackItem, Row, RowStats
from qwenvl_jax.data.record_errors import ErrorBudget
from qwenvl_jax.errors import ConfigError, DataError

# Streams begin with different groups; up to so many examples of a group count
# as given at the start of each.
_HEAD_START = 8


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
    rng = random.Random(f'{maker.seed}-{number}')
    self._head_start = [rng.random() * _HEAD_START for _ in groups]

  def plan(self) -> tuple[list[PackItem], RowStats]:
    """Returns what the next row holds, and what happened on the way."""
    maker = self._maker
    stats = RowStats(stream=self._number, streams=maker.streams)
    number = min(
      range(len(maker.groups)),
      key=lambda n: (
        (self._given[n] + self._head_start[n]) / maker.groups[n].weight
      ),
    )
    items = self._take(number, stats)
    left = maker.shape.length - sum(x.tokens for x in items)
    for other, group in enumerate(maker.groups):
      if group.name == maker.packer.filler and other != number:
        items += self._take(other, stats, left)
    stats.group = maker.groups[number].name
    if self._skipped or not maker.single:
      waiting = [[index for index, _ in pool] for pool in self._pools]
      stats.position = list(map(list, zip(self._taken, self._given, waiting)))
    return items, stats

  def _take(self, number, stats, left=None) -> list[PackItem]:
    """Takes a row's worth out of a group's pool, or what fits into the rest."""
    pool = self._pools[number]
    self._fill(number, pool, stats)
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

  def _fill(self, number, pool, stats) -> None:
    maker, items = self._maker, self._maker.groups[number].items
    dropped = collections.Counter()
    while len(pool) < maker.packer.pool:
      index = self._taken[number] * maker.streams + self._number
      self._taken[number] += 1
      item = items[index]
      stats.counts.seen(item.source)
      stats.counts.repaired(item.source, set(item.repaired))
      if item.error is None:
        pool.append((index, item))
        continue
      self._skipped = True
      stats.drop(item.source, item.error)
      dropped[item.source, item.error.reason] += 1
      if dropped.total() >= max(maker.limit.after, 100):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowMaker:
  """Makes the rows of a run.

  Attributes:
    groups: what rows are made of.
    shape: of the rows.
    packer: how they are packed.
    single: whether each row holds one item, so that a stream which left none
      out stands where the number of rows says.
    seed: of the streams' head starts.
    limit: of dropped records.
    prefetch, workers: as of `pipeline.Pipeline`.
    pad_id: fills rows up.
  """

  groups: Sequence[Group]
  shape: packing.RowShape
  packer: packing.Packer
  single: bool
  seed: int
  limit: ErrorBudget
  prefetch: int
  workers: int
  pad_id: int

  @property
  def streams(self) -> int:
    return self.packer.shards

  def rows(self, process: int, processes: int, state: State) -> Iterator[Row]:
    """Returns a process's rows from a state on.

    Raises:
      ConfigError: streams that cannot be divided among processes and workers,
        or another number of them than the state is of.
    """
    workers = max(self.workers, 1)
    if self.streams % (processes * workers):
      raise ConfigError(
        f'{self._shards_say()} cannot be divided among {processes} processes '
        f'of {workers} workers each; choose a multiple of '
        f'{processes * workers}, and keep it for the whole run'
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
    if self.workers:
      options = grain.MultiprocessingOptions(num_workers=self.workers)
      dataset = dataset.mp_prefetch(options)
    elif self.prefetch and not self.packer.threads:
      dataset = grain.experimental.ThreadPrefetchIterDataset(
        dataset, prefetch_buffer_size=self.prefetch
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
    self._ahead_of = maker.prefetch
    self._turns = itertools.cycle(order)
    # Made when it is their turn: there are many where a row holds one item.
    self._stream = functools.cache(
      functools.partial(PackingStream, maker=maker, state=state)
    )
    self._lay_out = functools.partial(
      packing.lay_out, shape=maker.shape, pad_id=maker.pad_id
    )
    if maker.packer.threads:
      self._threads = concurrent.futures.ThreadPoolExecutor(
        maker.packer.threads
      )

  def __next__(self) -> Row:
    if self._threads is None:
      return self._lay_out(*self._stream(next(self._turns)).plan())
    while len(self._ahead) <= self._ahead_of:
      plan = self._stream(next(self._turns)).plan()
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
