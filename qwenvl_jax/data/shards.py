"""Prepares public data sets: reads what was downloaded, writes shards.

A shard is written whole or not at all, with its report beside it, so that a
preparation that was interrupted goes on with the first shard that is missing.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from qwenvl_jax.data import roots, storage
from qwenvl_jax.data.bad import Counts, Limit
from qwenvl_jax.data.mend import mend
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

# Of data that does not come in parts: about 100 MB of photographs.
RECORDS_PER_SHARD = 1024

_LIMIT = Limit()

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
  limit: Limit = _LIMIT,
  progress: Progress = lambda what, done, total: None,
  **about: str,
) -> Report:
  """Writes the shards of a data set that are not there yet.

  Args:
    name: of the data set.
    readers: by split; splits whose files are absent are left out.
    manual_dir: where its files were downloaded to.
    data_dir: where to.
    workers: processes that write shards.
    limit: how many records may be dropped.
    progress: called with what is being done, how far it is, and of how much.
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
  counts, lengths = Counts(), {}
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for split, reader in present.items():
      # Only when it is complete: what was there says the old lengths.
      (folder / storage.INFO).unlink(missing_ok=True)
      reports = _write_split(
        name, split, reader, root, folder, workers, progress
      )
      lengths[split] = [report['length'] for report in reports]
      for report in reports:
        counts.add(report['counts'])
      limit.check(counts)
      if not sum(lengths[split]):
        raise DataError(
          f'{root}: no record of {name}, split {split!r}, can be used '
          f'({counts.of(split) or "none was found"}); see the instructions of '
          f'`qwenvl-data list --name {name}`'
        )
    storage.write_info(folder, name, lengths, **about)
  except OSError as error:
    raise DataError(
      f'cannot write to {folder} ({error}); free some space, or name another '
      'folder with --data_dir. Finished shards are kept'
    ) from error
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


def _write_split(name, split, reader, root, folder, workers, progress):
  jobs = [
    functools.partial(
      _write_shard, records=records, folder=folder, split=split, file=file
    )
    for file, records in _jobs(name, split, reader, root)
  ]
  what = f'{name}, {split}'
  progress(what, 0, len(jobs))
  if workers <= 1:
    reports = []
    for number, job in enumerate(jobs, start=1):
      reports.append(job())
      progress(what, number, len(jobs))
    return reports
  with concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context('spawn')
  ) as pool:
    futures = [pool.submit(job) for job in jobs]
    for number, _ in enumerate(
      concurrent.futures.as_completed(futures), start=1
    ):
      progress(what, number, len(jobs))
    return [future.result() for future in futures]


def _jobs(name, split, reader, root):
  """(file name, what yields its records) of each shard."""
  if hasattr(reader, 'parts'):
    sources = [functools.partial(reader.read, x) for x in reader.parts(root)]
  else:
    base = reader.images_in(root)
    try:
      everything = list(reader.records(root))
    except (AttributeError, TypeError, KeyError, ValueError) as error:
      raise DataError(
        f'{root}: the annotations of {name} are not in the format that they '
        f'are published in ({error!r}); download them again'
      ) from error
    count = max(1, math.ceil(len(everything) / RECORDS_PER_SHARD))
    sources = [
      functools.partial(_with_pictures, everything[i::count], base)
      for i in range(count)
    ]
  for index, source in enumerate(sources):
    yield storage.shard_name(name, split, index, len(sources)), source


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


def _write_shard(records, folder, split, file) -> dict[str, Any]:
  """Writes a shard unless it is there; returns its report."""
  report_file = folder / f'{file}.report.json'
  if (folder / file).exists():
    try:
      return json.loads(report_file.read_text())
    except (OSError, ValueError):  # Interrupted between the two.
      (folder / file).unlink()
  counts, examples = Counts(), []
  length = storage.write_shard(
    folder / file, _usable(records(), split, counts, examples)
  )
  report = {
    'length': length,
    'counts': counts.as_dict(),
    'examples': examples,
  }
  partial = report_file.with_name(f'{report_file.name}.partial')
  partial.write_text(json.dumps(report, indent=2), encoding='utf-8')
  os.replace(partial, report_file)
  return report


def _usable(found, split, counts, examples) -> Iterator[Record]:
  for record in found:
    counts.seen(split)
    try:
      if isinstance(record, BadRecordError):
        raise record
      mended, notes = mend(record)
    except BadRecordError as error:
      counts.dropped(split, error.reason)
      if len(examples) < 20:
        examples.append(f'{error.reason}: {error}'[:500])
      continue
    counts.repaired(split, set(notes))
    yield mended
