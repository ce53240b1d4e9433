"""Prepares public data sets: reads what was downloaded, writes shards."""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qwenvl_jax.data import roots, sharded_job, storage
from qwenvl_jax.data.record_errors import Counts, ErrorBudget
from qwenvl_jax.data.records import Record
from qwenvl_jax.data.sanitize import sanitize
from qwenvl_jax.data.sharded_job import ShardedJob
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

# Of data that does not come in parts: about 100 MB of photographs.
RECORDS_PER_SHARD = 1024

# Dropped records that a report describes.
_EXAMPLES = 20

# Of them, those that are told when enough is left.
_TOLD = 5

_LIMIT = ErrorBudget()

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the records of a data set.

  Attributes:
    folder: where it is.
    lengths: records of each shard, by split.
    counts: what was seen, repaired and dropped; sources are the splits.
  """

  folder: pathlib.Path
  lengths: dict[str, list[int]]
  counts: Counts


def prepare(
  name: str,
  readers: Mapping[str, Any],
  manual_dir: str | os.PathLike,
  data_dir: str | os.PathLike,
  *,
  workers: int = 1,
  limit: ErrorBudget = _LIMIT,
  again: bool = False,
  progress: Progress = lambda what, done, total: None,
  say: Callable[[str], None] = lambda line: None,
  with_digests: bool = False,
  **about: str,
) -> Report:
  """Writes the shards of a data set that are not there, or out of date.

  Args:
    name: of the data set.
    readers: by split; splits whose files are absent are left out.
    manual_dir: where its files were downloaded to.
    data_dir: where to.
    workers: processes that write shards.
    limit: how many records may be dropped.
    again: writes the others, too.
    progress: called with what is being done, how far it is, and of how much.
    say: called with lines about what is left out or made again.
    with_digests: notes what pictures hold, by which `own.Part` holds them out.
    **about: `description`, `homepage` and `license`, kept with the data.

  Raises:
    ConfigError: a folder that is not there.
    DataError: files missing or damaged, too many bad records, or no room.
  """
  root = pathlib.Path(manual_dir).expanduser()
  if not root.is_dir():
    raise ConfigError(
      f'--manual_dir {root} is no folder; download {name} first'
    )
  folder = storage.folder(data_dir, name)
  present = _present(name, readers, root)
  for split in readers.keys() - present.keys():
    say(f'{name}: split {split!r} is left out, {root} lacks its files')
  counts, lengths = Counts(), {}
  with sharded_job.writing(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for split, reader in present.items():
      origins, sources = _shards(name, reader, root)
      job = ShardedJob(folder, name, split, origins)
      for line in job.begin(again):
        say(line)
      _write_split(job, sources, workers, limit, progress, about, with_digests)
      lengths[split], found = job.totals()
      _check(job, root, sum(lengths[split]), found, limit)
      for line in _left_out(job, sum(found.of(split).values())):
        say(line)
      counts.update(found)
    others = storage.split_lengths(folder)
    storage.write_info(folder, name, {**others, **lengths}, **about)
  return Report(folder, lengths, counts)


def _present(name, readers, root) -> dict[str, Any]:
  """The readers whose files are there."""
  missing = {
    split: [x for x in reader.files if not (root / x).exists()]
    for split, reader in readers.items()
  }
  present = {x: readers[x] for x, absent in missing.items() if not absent}
  if present:
    return present
  absent = '; '.join(f'{k}: {", ".join(v)}' for k, v in missing.items())
  raise DataError(
    f'{root} lacks files of {name} ({absent}); '
    f'`qwenvl-data list --name {name}` tells where to get them'
  )


def _shards(name, reader, root) -> tuple[tuple[str, ...], list[Callable]]:
  """What each shard is made from, and what yields its records."""
  base, parts = reader.images_in(root), reader.parts(root)
  if parts is not None:
    origins = [
      f'{reader!r} of {x.relative_to(root).parent}/{sharded_job.origin_of(x)}'
      for x in parts
    ]
    return tuple(origins), [functools.partial(reader.read, x) for x in parts]
  try:
    everything = list(reader.records(root))
  except (AttributeError, TypeError, KeyError, ValueError) as error:
    raise DataError(
      f'{root}: the annotations of {name} are not in the format that they '
      f'are published in ({error!r}); download them again'
    ) from error
  count = max(1, math.ceil(len(everything) / RECORDS_PER_SHARD))
  slices = [everything[i::count] for i in range(count)]
  origins = [f'{reader!r} of records {_digest(x, base)}' for x in slices]
  return tuple(origins), [
    functools.partial(_with_pictures, x, base) for x in slices
  ]


def _digest(records: Sequence, base: pathlib.Path) -> str:
  """Of all that records say, and of the files of their pictures."""

  def parts():
    for record in records:
      yield repr(record)
      for image in getattr(record, 'images', ()):
        yield sharded_job.origin_of(pathlib.Path(base, image))

  return sharded_job.digest(parts())


def _with_pictures(records: Iterable, base: pathlib.Path) -> Iterator:
  """Reads the files that records name."""
  for record in records:
    if isinstance(record, BadRecordError):
      yield record
      continue
    try:
      images = [roots.read(base, name, record.id) for name in record.images]
    except BadRecordError as error:
      yield error
    else:
      yield dataclasses.replace(record, images=tuple(images))


def _write_split(
  job, sources, workers, limit, progress, about, with_digests
) -> None:
  """Writes what is missing; stops as soon as too much of it is bad."""
  left = job.unfinished()
  if not left:
    return
  # What says how much there is goes before it changes.
  others = storage.split_lengths(job.folder)
  if others.pop(job.split, None) is not None:
    if not others:
      (job.folder / storage.INFO).unlink()
    else:
      storage.write_info(job.folder, job.name, others, **about)
  counts = Counts()

  def judge(shard):
    counts.update(job.report(shard)['counts'])
    _judge(job, limit, counts)

  sharded_job.run(
    {
      x: functools.partial(_write_shard, job, x, sources[x], with_digests)
      for x in left
    },
    workers,
    functools.partial(progress, f'{job.name}, {job.split}'),
    judge,
  )


def _write_shard(
  job: ShardedJob, shard: int, source: Callable, with_digests: bool
) -> None:
  counts, examples, pictures = Counts(), [], []

  def records() -> Iterator[Record]:
    for record in _usable(source(), job.split, counts, examples):
      if with_digests:
        pictures.append(picture_digests(record))
      yield record

  report = {'length': storage.write_shard(job.path(shard), records())}
  report |= {'counts': counts, 'examples': examples}
  if with_digests:
    report['pictures'] = pictures
  job.finish(shard, report)


def picture_digests(record: Record) -> list[str]:
  """Digests of a record's pictures, equal where these are."""
  return [hashlib.blake2b(x, digest_size=8).hexdigest() for x in record.images]


def _check(job, root, length: int, counts: Counts, limit) -> None:
  """Raises DataError if too much of a split had to be dropped."""
  if not length:
    raise DataError(
      f'{root}: no record of {job.name}, split {job.split!r}, can be used '
      f'({counts.of(job.split) or "none was found"}){_example(job)}'
    )
  _judge(job, limit, counts, at_end=True)


def _judge(job, limit, counts, at_end: bool = False) -> None:
  limit.check(counts, at_end, 'raise --max_bad', lambda _: _example(job))


def _left_out(job, count: int) -> Iterator[str]:
  """The first of the dropped records, and where more are told."""
  examples = itertools.chain.from_iterable(
    job.report(shard)['examples'] for shard in job.shards
  )
  for example in itertools.islice(examples, _TOLD):
    yield f'dropped: {example}'
  if count > _TOLD:
    yield f'and {count - _TOLD:,} more; {job.folder}/*{sharded_job.REPORT}'


def _example(job) -> str:
  """The first dropped record, and where the others are told."""
  for shard in job.shards:
    if job.is_finished(shard) and job.report(shard)['examples']:
      return (
        f'. The first: {job.report(shard)["examples"][0]}; more in '
        f'{job.report_path(shard)}'
      )
  return ''


def _usable(found, split, counts, examples) -> Iterator[Record]:
  for record in found:
    counts.seen(split)
    try:
      if isinstance(record, BadRecordError):
        raise record
      mended, notes = sanitize(record)
    except BadRecordError as error:
      counts.dropped(split, error.reason)
      if len(examples) < _EXAMPLES:
        examples.append(' '.join(f'{error.reason}: {error}'.split())[:500])
      continue
    counts.repaired(split, set(notes))
    yield mended
