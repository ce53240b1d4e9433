"""Rows that samples of one task fill together, from endless mixed sources.

The work is divided into shards, a fixed number whatever the number of hosts and
worker processes: shard v packs samples v, v + V, v + 2V, .. of every task into
rows v, v + V, .. of the run. Each process owns some shards and each of its
workers some of those, so that rows do not depend on either number. Where a
shard stands is a few integers per task: how many samples it has taken, and
which of them wait in its pool.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from qwenvl_jax import image
from qwenvl_jax.data import packing
from qwenvl_jax.data.bad import Counts
from qwenvl_jax.data.batches import NOTE
from qwenvl_jax.data.examples import EncodedSample, encode_sample
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

# Rows of different shards begin with different tasks; up to so many examples
# of a task are taken for granted at the start of each.
_HEAD_START = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packer:
  """How rows are packed.

  Attributes:
    shards: V, a multiple of processes times worker processes.
    pool: samples of a task that each shard chooses from; more fill rows better
      and take more memory.
    threads: that decode pictures in each process; 0 decodes where rows are
      planned.
    filler: group whose samples without images also fill what is left of the
      rows of the others; '' for none. Samples do not see each other, so that it
      matters to nothing but the number of rows.
  """

  shards: int = 64
  pool: int = 32
  threads: int = 0
  filler: str = ''

  def __post_init__(self):
    if self.shards < 1 or self.pool < 1 or self.threads < 0:
      raise ConfigError(
        f'{self}: shards and pool must be at least 1, threads at least 0'
      )


@dataclasses.dataclass(frozen=True)
class Unit:
  """What a record gives a row: samples that stay together.

  Attributes:
    source: label of the stream.
    samples: empty if the record was dropped.
    dropped: why, a key of `bad.DROPPED`, or ''.
    repaired: keys of `bad.REPAIRED`.
  """

  source: str
  samples: tuple[EncodedSample, ...] = ()
  dropped: str = ''
  repaired: tuple[str, ...] = ()

  @property
  def tokens(self) -> int:
    return sum(map(len, self.samples))

  @property
  def images(self) -> int:
    return sum(len(x.images) for x in self.samples)

  @property
  def examples(self) -> int:
    return sum(x.examples for x in self.samples)


@dataclasses.dataclass(frozen=True)
class UnitMaker(grain.transforms.RandomMap):
  """Makes the unit of a record; a function of the record and the generator.

  Attributes:
    pipeline: `pipeline.Pipeline`.
    tokenizer: its vocabulary.
    source: the open source; elements that cannot be read are errors.
    tasks: makes the samples of a record.
    label: names the source in counts.
  """

  pipeline: Any
  tokenizer: Any
  source: Sequence[Any]
  tasks: Any
  label: str

  def __repr__(self) -> str:
    # Grain asks for it with every record: it must not list the mixture.
    return self.label

  def random_map(self, element, rng: np.random.Generator) -> Unit:
    choose = random.Random(int(rng.integers(1 << 62)))
    try:
      return self._unit(element, choose)
    except BadRecordError as error:
      return Unit(self.label, dropped=error.reason)

  def _unit(self, element, rng) -> Unit:
    def another():
      return _raised(self.source[rng.randrange(len(self.source))])

    config = self.pipeline
    samples = self.tasks(_raised(element), rng, another)
    if not samples:
      raise BadRecordError('no_question', f'{self.label}: nothing to ask')
    encoded, repaired = [], []
    for sample in samples:
      whole = _encoded(sample, self.tokenizer, config)
      kept = packing.cut(whole, config.sequence_length, config.image_slots)
      if len(kept) < len(whole):
        repaired.append('cut_text')
      encoded.append(kept)
    encoded = packing.fill(encoded, config.sequence_length, config.image_slots)
    return Unit(self.label, tuple(encoded), repaired=tuple(repaired))


def _encoded(sample, tokenizer, config) -> EncodedSample:
  try:
    return encode_sample(
      sample,
      tokenizer,
      config.image_tokens,
      length_alpha=config.length_alpha,
      max_length=config.sequence_length,
    )
  except BadRecordError:
    raise
  except DataError as error:  # Tags that do not pair up.
    raise BadRecordError('malformed', str(error)) from error


def _raised(element):
  if isinstance(element, BadRecordError):
    raise element
  return element


@dataclasses.dataclass(frozen=True)
class Group:
  """Samples that fill rows together.

  Attributes:
    name: of the task.
    weight: share of examples, relative to the other groups.
    units: endless, by random access.
  """

  name: str
  weight: float
  units: Any


@dataclasses.dataclass(frozen=True)
class _Plan:
  """A row to be: what stands in it, and the state after it."""

  units: tuple[Unit, ...]
  note: dict[str, Any]


class _Shard:
  """Plans the rows of one shard, one after the other."""

  def __init__(self, number: int, groups: Sequence[Group], config, state):
    self._number = number
    self._groups = groups
    self._config = config
    self._counts = Counts()
    # Per group: samples taken, examples given, (index, unit) that wait.
    self._taken = [0] * len(groups)
    self._given = [0] * len(groups)
    self._pools = [[] for _ in groups]
    rng = random.Random(f'{config.seed}-{number}')
    self._head_start = [rng.random() * _HEAD_START for _ in groups]
    if state is not None:
      self._restore(state)

  def _restore(self, state) -> None:
    if len(state) != len(self._groups):
      raise DataError(
        f'the saved state has {len(state)} tasks, the mixture '
        f'{len(self._groups)}; go on with the config.gin of the run'
      )
    for number, (taken, given, waiting) in enumerate(state):
      self._taken[number], self._given[number] = taken, given
      units = self._groups[number].units
      self._pools[number] = [(index, units[index]) for index in waiting]

  def _state(self) -> list:
    waiting = [[index for index, _ in pool] for pool in self._pools]
    return [list(x) for x in zip(self._taken, self._given, waiting)]

  def plan(self) -> _Plan:
    """The next row."""
    number = min(
      range(len(self._groups)),
      key=lambda n: (
        (self._given[n] + self._head_start[n]) / self._groups[n].weight
      ),
    )
    units = self._take(number)
    left = self._config.sequence_length - sum(x.tokens for x in units)
    for other, group in enumerate(self._groups):
      if group.name == self._config.packer.filler and other != number:
        units += self._take(other, left)
    note = {
      'shard': self._number,
      'state': self._state(),
      'group': self._groups[number].name,
      'counts': self._counts.take(),
    }
    return _Plan(tuple(units), note)

  def _take(self, number: int, left: int | None = None) -> list[Unit]:
    """Takes a row's worth out of a group's pool, or what fits into the rest."""
    pool = self._pools[number]
    self._fill(number, pool)
    tokens = [unit.tokens for _, unit in pool]
    images = [unit.images for _, unit in pool]
    if left is None:
      config = self._config
      length, slots = config.sequence_length, config.image_slots
      positions = packing.choose(tokens, images, length, slots)
    else:
      # Nothing has to be taken: in place of the first stands an empty sample.
      positions = packing.choose([0, *tokens], [0, *images], left, 0)
      positions = [x - 1 for x in positions[1:]]
    units = [pool[x][1] for x in positions]
    kept = set(positions)
    pool[:] = [x for i, x in enumerate(pool) if i not in kept]
    self._given[number] += sum(x.examples for x in units)
    return units

  def _fill(self, number, pool) -> None:
    config, units = self._config, self._groups[number].units
    dropped = collections.Counter()
    while len(pool) < config.packer.pool:
      index = self._taken[number] * config.packer.shards + self._number
      self._taken[number] += 1
      unit = units[index]
      self._counts.seen(unit.source)
      self._counts.repaired(unit.source, unit.repaired)
      if unit.samples:
        pool.append((index, unit))
        continue
      self._counts.dropped(unit.source, unit.dropped)
      dropped[f'{unit.source}: {unit.dropped}'] += 1
      if dropped.total() >= max(config.limit.after, 100):
        raise DataError(
          f'task {self._groups[number].name}: {dropped.total()} records had to '
          f'be dropped to fill one pool, most for '
          f'{dropped.most_common(1)[0][0]}; mend or take out that source'
        )


class PackedRows(grain.IterDataset):
  """The rows of some shards, in turn."""

  def __init__(self, config, groups: Sequence[Group], order, states, pad_id):
    """Rows from a state on.

    Args:
      config: `pipeline.Pipeline`.
      groups: what rows are made of.
      order: shards whose turn it is, first the one that gives the next row.
      states: of the shards that are not at their start, by number as text.
      pad_id: fills rows up.
    """
    super().__init__()
    self._config = config
    self._groups = groups
    self._order = list(order)
    self._states = states
    self._pad_id = pad_id

  def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
    """Called in a worker process: which of the rows it makes."""
    del sequential_slice
    self._order = self._order[sl]

  def __iter__(self) -> grain.DatasetIterator:
    return _RowIterator(
      self._config, self._groups, self._order, self._states, self._pad_id
    )


class _RowIterator(grain.DatasetIterator):
  """Plans rows ahead, and lets threads decode their pictures."""

  def __init__(self, config, groups, order, states, pad_id):
    super().__init__()
    self._config = config
    self._threads = None
    shards = [
      _Shard(number, groups, config, states.get(str(number)))
      for number in order
    ]
    self._turns = itertools.cycle(shards)
    self._assemble = functools.partial(assemble, config=config, pad_id=pad_id)
    self._ahead = collections.deque()
    if config.packer.threads:
      self._threads = concurrent.futures.ThreadPoolExecutor(
        config.packer.threads
      )

  def __next__(self) -> dict[str, Any]:
    if self._threads is None:
      return self._assemble(next(self._turns).plan())
    while len(self._ahead) <= self._config.prefetch:
      plan = next(self._turns).plan()
      self._ahead.append(self._threads.submit(self._assemble, plan))
    return self._ahead.popleft().result()

  def get_state(self) -> dict[str, Any]:
    """Nothing: every row carries the state of its shard."""
    return {}

  def set_state(self, state) -> None:
    del state

  def close(self) -> None:
    super().close()
    if self._threads is not None:
      self._threads.shutdown(wait=False, cancel_futures=True)


def assemble(plan: _Plan, config, pad_id: int) -> dict[str, Any]:
  """Decodes a row's pictures and lays it out.

  A record whose picture cannot be read is left out of the row and counted.
  """
  counts = Counts(plan.note['counts'])
  samples = []
  for unit in plan.units:
    notes = []
    try:
      samples += [_decoded(x, config.image_size, notes) for x in unit.samples]
    except BadRecordError as error:
      counts.dropped(unit.source, error.reason)
    counts.repaired(unit.source, set(notes))
  row = packing.make_row(
    samples,
    config.sequence_length,
    config.image_slots,
    config.image_size,
    pad_id,
    decode=lambda pixels, size, record: pixels,
  )
  note = plan.note | {'counts': counts.as_dict()}
  return {**row.arrays, NOTE: json.dumps(note)}


def _decoded(sample: EncodedSample, size: int, notes) -> EncodedSample:
  pixels = tuple(
    image.pixels(x, size, sample.record, notes, image.MIN_SIDE)
    for x in sample.images
  )
  return dataclasses.replace(sample, images=pixels)


def rows(
  config, groups: Sequence[Group], pad_id: int, process: int, processes: int,
  state: dict[str, Any],
) -> Iterator[dict[str, Any]]:  # fmt: skip
  """This process's rows from a state of `batches.Batches` on.

  Raises:
    ConfigError: shards that cannot be divided among processes and workers.
  """
  shards, workers = config.packer.shards, max(config.workers, 1)
  if shards % (processes * workers):
    raise ConfigError(
      f'Packer.shards={shards} cannot be divided among {processes} processes '
      f'of {workers} workers each; choose a multiple of {processes * workers}. '
      'A run keeps its number of shards'
    )
  # Row r of the run is a row of shard r mod V; a process has every so manieth.
  first = state['row'] + process
  order = [
    (first + step * processes) % shards for step in range(shards // processes)
  ]
  dataset = PackedRows(config, groups, order, state['shards'], pad_id)
  if config.workers:
    options = grain.MultiprocessingOptions(num_workers=config.workers)
    dataset = dataset.mp_prefetch(options)
  return iter(dataset)
