"""Cleans one shard at a time, in two steps with a comparison of all between.

`clean_shard` applies the rules that see one pair: it writes the candidates and
their fingerprints. When the best of every group of fingerprints are known,
`finish_shard` writes the candidates among them. Either step ends by writing a
file that says that it is done; a shard with that file is not done again, and
whatever a killed run leaves besides is overwritten.
"""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from qwenvl_jax.data import shard_files, storage
from qwenvl_jax.data.cleaning import unique
from qwenvl_jax.data.cleaning.inputs import Shard
from qwenvl_jax.data.cleaning.pair import (
  Broken,
  Pair,
  Picture,
  clean,
)
from qwenvl_jax.data.cleaning.tally import KEPT, Tally
from qwenvl_jax.data.cleaning.text_rules import is_chinese
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError, DataError


@dataclasses.dataclass(frozen=True)
class Job:
  """What every worker has to know.

  Attributes:
    output: the folder that is written, DATA_DIR/NAME.
    shards: what is read; shard i becomes shard i of the output.
    rules: functions of one pair, in order (`pair.Rule`).
    unique: rules about alike pairs, in order (`unique.DuplicatePairs`, ..).
    fingerprints: what makes pairs alike.
  """

  output: str
  shards: tuple[Shard, ...]
  rules: tuple[Any, ...]
  unique: tuple[Any, ...]
  fingerprints: unique.Fingerprints

  def work(self, kind: str, shard: int, suffix: str) -> epath.Path:
    """A file of the folder for what is only needed until all is done."""
    return epath.Path(self.output) / 'work' / f'{kind}-{shard:05d}.{suffix}'

  @property
  def name(self) -> str:
    """Of the data set that is written: the folder's."""
    return epath.Path(self.output).name

  @property
  def folder(self) -> epath.Path:
    """Of the result, where `sources.Prepared` looks for it."""
    return epath.Path(self.output) / storage.VERSION

  def final(self, shard: int) -> epath.Path:
    """A file of the result."""
    count = len(self.shards)
    return self.folder / storage.shard_name(self.name, 'train', shard, count)

  @property
  def is_complete(self) -> bool:
    return (self.folder / storage.INFO).exists()

  def is_cleaned(self, shard: int) -> bool:
    return self.work('candidates', shard, 'json').exists()

  def is_finished(self, shard: int) -> bool:
    return self.work('finished', shard, 'json').exists()


def encode(pair: Pair) -> bytes:
  """A pair as `storage` keeps records: one picture, one caption."""
  return storage.serialize(
    Record(
      id=f'{pair.source}/{pair.id}',
      images=(pair.picture.encoded,),
      size=pair.picture.size,
      language='zh' if is_chinese(pair.text) else 'en',
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
  if job.is_cleaned(shard):
    return shard
  tally, prints = Tally(), []
  with _writing(job):
    shard_files.write_records(
      job.work('candidates', shard, 'array_record'),
      _candidates(job, shard, tally, prints),
    )
    table = np.array(prints, unique.FINGERPRINT)
    with (
      shard_files.appearing(job.work('candidates', shard, 'npy')) as local,
      local.open('wb') as file,
    ):
      np.save(file, table, allow_pickle=False)
    shard_files.write_text(
      job.work('candidates', shard, 'json'), tally.to_json()
    )
  return shard


def _candidates(job, shard, tally, prints) -> Iterator[bytes]:
  for record in job.shards[shard].read():
    if isinstance(record, Broken):
      tally.add_broken(record)
      continue
    outcome = clean(record, job.rules)
    tally.add(outcome, record.text)
    if not outcome.reason:
      prints.append(job.fingerprints(outcome.pair))
      yield encode(outcome.pair)


def entries(job: Job, shard: int) -> Iterator[unique.Entry]:
  """What passed the rules of a cleaned shard, to be compared."""
  with job.work('candidates', shard, 'npy').open('rb') as file:
    table = np.load(file, allow_pickle=False)
  for index, (image, text, length) in enumerate(table.tolist()):
    yield unique.Entry(image, text, length, shard, index)


def finish_shard(
  job: Job, shard: int, kept: Mapping[str, Collection[int]]
) -> int:
  """Writes what is kept of a cleaned shard; returns the shard's number.

  Args:
    job: as for `clean_shard`.
    shard: its number.
    kept: name of each rule of `job.unique` -> indices of the candidates that
      it keeps, of those that the rules before it keep.

  Raises:
    DataError: the candidates are damaged, or nothing can be written.
  """
  if job.is_finished(shard):
    return shard
  tally = Tally()
  with _writing(job):
    shard_files.write_records(job.final(shard), _kept(job, shard, kept, tally))
    shard_files.write_text(job.work('finished', shard, 'json'), tally.to_json())
  return shard


def _kept(job, shard, kept, tally) -> Iterator[bytes]:
  path = job.work('candidates', shard, 'array_record')
  try:
    for index, data in enumerate(shard_files.read_records(path)):
      reason = KEPT
      for rule in job.unique:
        if index not in kept[rule.name]:
          reason = rule.name
          break
      tally.add_compared(decode(data), reason)
      if reason == KEPT:
        yield data
  except (RuntimeError, ValueError, IndexError, BadRecordError) as error:
    raise DataError(
      f'{path} is damaged ({error}); delete {path.with_suffix(".json")} and '
      'run the same command again'
    ) from error


class _writing:
  """Turns failures to write into errors for people."""

  def __init__(self, job: Job):
    self._folder = os.fspath(job.output)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if isinstance(error, OSError):
      raise DataError(
        f'cannot write to {self._folder} ({error}); free some space or name '
        'another folder, then run the same command again: finished shards stay'
      ) from error
    return False


def read_tally(path: epath.Path) -> Tally:
  """Raises DataError on a damaged file."""
  try:
    return Tally.from_json(path.read_text())
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DataError(
      f'{path} is damaged ({error}); delete it and run the same command again'
    ) from error
