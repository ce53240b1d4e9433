"""Cleans one shard at a time, in two steps with a comparison of all between.

`clean_shard` applies the rules that see one pair: it writes the candidates and
their fingerprints. When the best of every group of fingerprints are known,
`finish_shard` writes the candidates among them. Either step ends by writing a
file that says that it is done; a shard with that file is not done again, and
whatever a killed run leaves besides is overwritten.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.data import sharded_job, storage
from qwenvl_jax.data.cleaning import unique
from qwenvl_jax.data.cleaning.inputs import Shard
from qwenvl_jax.data.cleaning.pair import Outcome, Pair, Picture, clean
from qwenvl_jax.data.cleaning.rule_stats import KEPT, RuleStats
from qwenvl_jax.data.languages import language_of
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError, DataError


class _Stage(sharded_job.ShardedJob):
  """Shards whose reports hold counts."""

  def tally(self, shard: int) -> RuleStats:
    """Returns what a report counts.

    Raises:
      DataError: it is damaged.
    """
    try:
      return RuleStats.from_json(self.report(shard)['tally'])
    except (ValueError, KeyError, TypeError) as error:
      raise self._damage(shard, error) from error


class Candidates(_Stage):
  """What passed the rules of each shard; in the end only its reports stay."""

  def path(self, shard: int) -> Path:
    return self.folder / f'candidates-{shard:05d}.array_record'

  def report_path(self, shard: int) -> Path:
    return self.path(shard).with_suffix('.json')

  def fingerprints_path(self, shard: int) -> Path:
    return self.path(shard).with_suffix('.npy')

  def is_finished(self, shard: int) -> bool:
    return self.report_path(shard).exists()


class Finished(_Stage):
  """The shards of the result."""

  def report_path(self, shard: int) -> Path:
    return self.folder.parent / 'work' / f'finished-{shard:05d}.json'


@dataclasses.dataclass(frozen=True)
class Job:
  """What every worker has to know.

  Attributes:
    output: the folder that is written, DATA_DIR/NAME.
    shards: what is read; shard i becomes shard i of the output.
    rules: functions of one pair, in order (`pair.Rule`).
    unique: rules about alike pairs, in order (`unique.DuplicatePairs`, ..).
    fingerprints: what makes pairs alike.
    origins: of the shards, as they are when the job is made.
  """

  output: str
  shards: tuple[Shard, ...]
  rules: tuple[Any, ...]
  unique: tuple[Any, ...]
  fingerprints: unique.Fingerprints
  origins: tuple[str, ...] = ()

  def __post_init__(self):
    origins = (
      sharded_job.origin_of(buckets.as_path(x.path)) for x in self.shards
    )
    object.__setattr__(self, 'origins', self.origins or tuple(origins))

  @property
  def name(self) -> str:
    """Of the data set that is written: the folder's."""
    return buckets.as_path(self.output).name

  @property
  def folder(self) -> Path:
    """Of the result, where `sources.Prepared` looks for it."""
    return buckets.as_path(self.output) / storage.VERSION

  @functools.cached_property
  def candidates(self) -> Candidates:
    folder = buckets.as_path(self.output) / 'work'
    return Candidates(folder, self.name, 'candidates', self.origins)

  @functools.cached_property
  def finished(self) -> Finished:
    # What is kept of a shard depends on all others.
    among = sharded_job.digest(self.origins)
    origins = tuple(f'{x} among {among}' for x in self.origins)
    return Finished(self.folder, self.name, 'train', origins)

  @property
  def is_complete(self) -> bool:
    return (self.folder / storage.INFO).exists()


def encode(pair: Pair) -> bytes:
  """A pair as `storage` keeps records: one picture, one caption."""
  return storage.serialize(
    Record(
      id=f'{pair.source}/{pair.id}',
      images=(pair.picture.encoded,),
      size=pair.picture.size,
      language=language_of(pair.text),
      captions=(pair.text,),
    )
  )


def decode(data: bytes) -> Pair:
  """The pair of `encode`, without its score."""
  record = storage.parse(data)
  source, _, id_ = record.id.partition('/')
  return Pair(id_, source, record.captions[0], Picture(record.images[0]))


def clean_shard(job: Job, shard: int) -> int:
  """Applies the rules to each record of a shard; returns the shard's number.

  Raises:
    DataError: the shard is not there, or nothing can be written.
  """
  if job.candidates.is_finished(shard):
    return shard
  tally, prints = RuleStats(), []
  with sharded_job.writing(job.output):
    storage.write_records(
      job.candidates.path(shard), _candidates(job, shard, tally, prints)
    )
    table = np.array(prints, unique.FINGERPRINT)
    with (
      buckets.atomic_write(job.candidates.fingerprints_path(shard)) as local,
      local.open('wb') as file,
    ):
      np.save(file, table, allow_pickle=False)
    job.candidates.finish(shard, {'tally': tally.to_json()})
  return shard


def _candidates(job, shard, tally, prints) -> Iterator[bytes]:
  for record in job.shards[shard].read():
    if isinstance(record, Outcome):
      tally.add(record, record.pair.text)
      continue
    outcome = clean(record, job.rules)
    tally.add(outcome, record.text)
    if not outcome.reason:
      prints.append(job.fingerprints(outcome.pair))
      yield encode(outcome.pair)


def entries(job: Job, shard: int) -> Iterator[unique.Entry]:
  """What passed the rules of a cleaned shard, to be compared."""
  with job.candidates.fingerprints_path(shard).open('rb') as file:
    table = np.load(file, allow_pickle=False)
  for index, (image, text, length) in enumerate(table.tolist()):
    yield unique.Entry(image, text, length, shard, index)


def finish_shard(
  job: Job, shard: int, kept: Mapping[str, Collection[int]]
) -> int:
  """Writes what is kept of a cleaned shard; returns the shard's number.

  `kept` holds for each rule of `job.unique` the indices of the candidates that
  it keeps, of those that the rules before it keep.

  Raises:
    DataError: the candidates are damaged, or nothing can be written.
  """
  if job.finished.is_finished(shard):
    return shard
  tally = RuleStats()
  with sharded_job.writing(job.output):
    path = job.finished.path(shard)
    storage.write_records(path, _kept(job, shard, kept, tally))
    job.finished.finish(shard, {'tally': tally.to_json()})
  return shard


def _kept(job, shard, kept, tally) -> Iterator[bytes]:
  path = job.candidates.path(shard)
  try:
    for index, data in enumerate(storage.read_records(path)):
      names = (rule.name for rule in job.unique)
      reason = next((x for x in names if index not in kept[x]), KEPT)
      pair = decode(data)
      tally.add_final(Outcome(pair, reason), pair.text)
      if reason == KEPT:
        yield data
  except (RuntimeError, ValueError, IndexError, BadRecordError) as error:
    raise DataError(
      f'{path} is damaged ({error}); delete {path.with_suffix(".json")} and '
      'run the same command again'
    ) from error
