"""Rows into batches, with counts, and a state for any number of processes."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import grain
import numpy as np

from qwenvl_jax.data.packing import Row
from qwenvl_jax.data.record_errors import Counts, ErrorBudget
from qwenvl_jax.errors import DataError

State = dict[str, Any]


class Batches(grain.DatasetIterator):
  """Endless batches of one process.

  The state is exact and about the whole run, not about a process: the number of
  rows before it, and of each stream that the number of rows does not say it of
  where it stands ('shards'; 'of' is their number). So a run may go on with
  another number of processes (`merge`).
  """

  def __init__(
    self,
    start: Callable[[State], grain.DatasetIterator],
    rows: int,
    processes: int = 1,
    limit: ErrorBudget | None = None,
  ):
    """Starts nothing yet.

    Args:
      start: makes this process's rows from a state on.
      rows: in a batch over all processes.
      processes: that share them.
      limit: of dropped records; None for none.
    """
    super().__init__()
    self._start = start
    self._batch = rows
    self._processes = processes
    self._limit = limit
    self._rows = None
    self._row = 0
    self._shards = {}
    self._of = 0
    self._counts = Counts()
    self._dropped = {}
    self._tokens = [0, 0]

  def __next__(self) -> dict[str, np.ndarray]:
    if self._rows is None:
      self._rows = self._start(self.get_state())
    rows = [
      self._noted(next(self._rows))
      for _ in range(self._batch // self._processes)
    ]
    self._row += self._batch
    if self._limit is not None:
      self._limit.check(self._counts, example=self._examples)
    return {name: np.stack([x[name] for x in rows]) for name in rows[0]}

  def _noted(self, row: Row) -> dict[str, np.ndarray]:
    arrays, stats = row
    self._counts.update(stats.counts)
    self._of = stats.streams
    if stats.position is not None:
      self._shards[str(stats.stream)] = stats.position
    for key, message in stats.dropped.items():
      if key not in self._dropped:
        self._dropped[key] = message
        logging.warning('dropped, %s: %s (the first of these)', key[1], message)
    if 'segment_ids' in arrays:
      self._tokens[0] += int(np.count_nonzero(arrays['segment_ids']))
      self._tokens[1] += arrays['segment_ids'].size
    return arrays

  def _examples(self, source: str) -> str:
    of_source = [x for key, x in self._dropped.items() if key[0] == source]
    return f'. For example: {"; ".join(of_source[:3])}' if of_source else ''

  def get_state(self) -> State:
    """Where to go on; `json.dumps` takes it."""
    state = {
      'row': self._row,
      'shards': dict(self._shards),
      'counts': dict(self._counts),
      'tokens': list(self._tokens),
    }
    return state | ({'of': self._of} if self._of else {})

  def set_state(self, state: State) -> None:
    """Goes on from a state, of this process or of all (`merge`).

    Raises:
      DataError: not such a state.
    """
    self.close_rows()
    try:
      self._row = int(state['row'])
      self._shards = dict(state['shards'])
      self._of = int(state.get('of', 0))
      self._counts = Counts(state['counts'])
      self._tokens = list(state['tokens'])
    except (KeyError, TypeError, ValueError) as error:
      raise DataError(
        f'the saved state of the data is not one ({error!r}); it may be of an '
        'earlier version: start a new run from the checkpoint (InitFrom)'
      ) from error

  @staticmethod
  def merge(states: Iterable[State], process: int) -> State:
    """One state of those that all processes saved at the same step.

    Args:
      states: of every process.
      process: which process goes on from it; the first takes the counts over.
    """
    merged = {'row': 0, 'shards': {}, 'counts': {}, 'tokens': [0, 0]}
    counts = Counts()
    for state in states:
      merged['row'] = state['row']
      merged['shards'] |= state['shards']
      merged |= {'of': state['of']} if 'of' in state else {}
      counts.update(state['counts'])
      merged['tokens'] = [
        a + b for a, b in zip(merged['tokens'], state['tokens'])
      ]
    if process:
      return merged | {'tokens': [0, 0]}
    return merged | {'counts': dict(counts)}

  @property
  def counts(self) -> Counts:
    """What happened to the records of this process."""
    return self._counts

  def sums(self) -> State:
    """What `describe` takes of each process; JSON holds it."""
    return {'counts': dict(self._counts), 'tokens': list(self._tokens)}

  @staticmethod
  def describe(all_sums: Iterable[State]) -> dict[str, float]:
    """Numbers for the log of a run: utilization, and bad records by reason.

    Args:
      all_sums: from `sums`, of each process that reads a part of its own.
    """
    found, counts, used, total = {}, Counts(), 0, 0
    for sums in all_sums:
      counts.update(sums['counts'])
      used, total = used + sums['tokens'][0], total + sums['tokens'][1]
    if total:
      found['data/utilization'] = used / total
    for source in counts.sources():
      for kind in ('dropped', 'repaired'):
        for reason, count in counts.of(source, kind).items():
          found[f'data/{kind}/{source}/{reason}'] = count
    return found

  def close_rows(self) -> None:
    """Ends the processes and threads that make rows."""
    if self._rows is not None:
      self._rows.close()
    self._rows = None

  def close(self) -> None:
    super().close()
    self.close_rows()
