"""Shards of a data set: written one by one, and again if their origin changes.

A shard is written whole or not at all, and then its report, which says what it
was made from. A job that was interrupted goes on with the shards that have no
report; one that is started again after its input changed makes those shards
anew whose input it was. `prepare`, `clean` and `make-ocr` work so.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.data import storage
from qwenvl_jax.data.record_errors import Counts
from qwenvl_jax.errors import ConfigError, DataError

# Called with how many shards are done, and of how many.
Progress = Callable[[int, int], None]

# What follows the name of a shard in that of its report.
REPORT = '.report.json'


@dataclasses.dataclass(frozen=True)
class ShardedJob:
  """What is to be written.

  Attributes:
    folder: of the shards.
    name: of the data set.
    split: which part of it.
    origins: what each shard is made from: settings and input, with what changes
      when the input does (`origin_of`).
  """

  folder: Path
  name: str
  split: str
  origins: tuple[str, ...]

  @property
  def shards(self) -> range:
    return range(len(self.origins))

  def path(self, shard: int) -> Path:
    """Returns where a shard is or will be."""
    return self.folder / storage.shard_name(
      self.name, self.split, shard, len(self.origins)
    )

  def report_path(self, shard: int) -> Path:
    path = self.path(shard)
    return path.with_name(f'{path.name}{REPORT}')

  def is_finished(self, shard: int) -> bool:
    """Whether a shard is written; after `begin`, from its present origin."""
    return self.report_path(shard).exists() and self.path(shard).exists()

  def unfinished(self) -> list[int]:
    return [shard for shard in self.shards if not self.is_finished(shard)]

  def begin(self, again: bool = False) -> list[str]:
    """Removes what is not made from the present origins.

    Args:
      again: removes everything.

    Returns:
      Lines that tell a person about it.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    buckets.remove_partial(self.folder)
    said = self._take_over_others(again)
    outdated = []
    for shard in self.shards:
      if not self.is_finished(shard):
        self.forget(shard)
        continue
      was = _origin(self.report_path(shard))
      if again or was != self.origins[shard]:
        outdated.append((was, self.origins[shard]))
        self.forget(shard)
    if again and outdated:
      said.append(f'{self._what}: all shards are made again')
    elif outdated:
      was, now = outdated[0]
      said.append(
        f'{self._what}: {len(outdated)} of {len(self.origins)} shards are made '
        'again, since what they are made from has changed (e.g. '
        f'{was or "something unknown"}, now {now})'
      )
    return list(map(_plain, said))

  def forget(self, shard: int) -> None:
    """Removes a shard: its report first, without which it does not count."""
    self.report_path(shard).unlink(missing_ok=True)
    self.path(shard).unlink(missing_ok=True)

  def finish(self, shard: int, report: dict[str, Any]) -> None:
    """Writes the report of a shard that has been written."""
    found = {'made_from': self.origins[shard], **report}
    # In ASCII, since names of files need not be text.
    buckets.write(self.report_path(shard), json.dumps(found, indent=1))

  def report(self, shard: int) -> dict[str, Any]:
    """Returns the report of a finished shard.

    Raises:
      DataError: it is damaged.
    """
    try:
      found = json.loads(self.report_path(shard).read_text(encoding='utf-8'))
      return {**found}
    except (OSError, ValueError, TypeError) as error:
      raise self._damage(shard, error) from error

  def totals(self) -> tuple[list[int], Counts]:
    """Returns the lengths of all shards, and what all reports count.

    Raises:
      DataError: a report is damaged.
    """
    lengths, counts = [], Counts()
    for shard in self.shards:
      report = self.report(shard)
      try:
        lengths.append(int(report['length']))
        counts.update(report['counts'])
      except (KeyError, TypeError, ValueError) as error:
        raise self._damage(shard, error) from error
    return lengths, counts

  def _damage(self, shard: int, error: Exception) -> DataError:
    return DataError(
      f'{self.report_path(shard)} is damaged ({error!r}); delete it and run '
      'the same command again'
    )

  @property
  def _what(self) -> str:
    return f'{self.name}, {self.split}'

  def _take_over_others(self, again: bool) -> list[str]:
    """Renames shards of another count that have an origin of now.

    The rest of them is removed: nothing tells how many shards belong together
    but their names.
    """
    names = {self.path(shard).name for shard in self.shards}
    wanted = {
      origin: shard
      for shard, origin in enumerate(self.origins)
      if not self.is_finished(shard) and not again
    }
    others = {
      path.name.removesuffix(REPORT)
      for path in self.folder.glob(f'{self.name}-{self.split}.array_record-*')
    } - names
    taken = 0
    for name in sorted(others):
      shard, report = self.folder / name, self.folder / f'{name}{REPORT}'
      new = wanted.pop(_origin(report), None)
      if new is not None and shard.exists():
        shard.replace(self.path(new))
        report.replace(self.report_path(new))
        taken += 1
      report.unlink(missing_ok=True)
      shard.unlink(missing_ok=True)
    if not others:
      return []
    return [
      f'{self._what}: {len(others)} shards were of another number of shards: '
      f'{taken} are kept, the rest is removed'
    ]


def notes(folder: Path, name: str, split: str, key: str) -> list[Any]:
  """Returns what the reports of a split say of its records, one after another.

  Args:
    folder: of the shards.
    name: of the data set.
    split: a part of it.
    key: under which reports hold a list with an entry for each record.

  Raises:
    DataError: a report is damaged, or says nothing of the kind.
  """
  found, lengths = [], storage.split_lengths(folder)[split]
  for index, length in enumerate(lengths):
    shard = folder / storage.shard_name(name, split, index, len(lengths))
    file = shard.with_name(f'{shard.name}{REPORT}')
    try:
      noted = json.loads(file.read_text(encoding='utf-8'))[key]
      if len(noted) != length:
        raise ValueError(f'{len(noted)} {key}')
      found += noted
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise DataError(
        f'{file} cannot be read ({error!r}); run `qwenvl-data prepare {name}` '
        'again, into the same folder'
      ) from error
  return found


def _origin(report: Path) -> str | None:
  """What a shard was made from; None if that is not known."""
  try:
    found = json.loads(report.read_text(encoding='utf-8'))['made_from']
    return found if isinstance(found, str) else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _plain(text: str) -> str:
  """Spells out what no terminal or file takes: names need not be text."""
  return text.encode('utf-8', 'backslashreplace').decode()


def origin_of(path: Path) -> str:
  """Returns a file's name with what changes when it is written again."""
  try:
    return f'{path.name} {"/".join(map(str, buckets.version(path)))}'
  except (OSError, ValueError):
    return f'{path.name} missing'


def digest(parts: Iterable[str]) -> str:
  """Returns 32 characters that stand for a list of texts."""
  found = hashlib.blake2b(digest_size=16)
  for part in parts:
    found.update(part.encode('utf-8', 'surrogatepass') + b'\0')
  return found.hexdigest()


@contextlib.contextmanager
def writing(folder: object) -> Iterator[None]:
  """Tells people of a folder that cannot be written.

  Raises:
    DataError: in the place of an OSError.
  """
  try:
    yield
  except OSError as error:
    raise DataError(
      f'cannot write to {folder} ({error}); free some space or name another '
      'folder, then run the same command again: finished shards are kept'
    ) from error


def check_settings(file: Path, settings: str, again: bool = False) -> None:
  """Writes the settings of a job, or compares them, a setting a line.

  Raises:
    ConfigError: the folder was begun with others.
  """
  settings = _plain(settings)
  before = ''
  if file.exists() and not again:
    before = file.read_text(encoding='utf-8')
  if not before:
    file.parent.mkdir(parents=True, exist_ok=True)
    buckets.write(file, settings)
  elif before != settings:
    old, new = before.splitlines(), settings.splitlines()
    gone = next((x for x in old if x not in new), None)
    come = next((x for x in new if x not in old), None)
    difference = f'{gone or "nothing"}, now {come or "nothing"}'
    if gone is None and come is None:
      difference = 'the same in another order'
    raise ConfigError(
      f'{file.parent} was begun with other settings ({difference}); name '
      'another folder, or give --again to make everything again'
    )


def run(
  works: Mapping[int, Callable[[], Any]],
  workers: int,
  progress: Progress,
  done: Callable[[int], None] = lambda shard: None,
) -> None:
  """Does the work of some shards, in one process or many.

  Args:
    works: by shard; can be pickled.
    workers: processes; 1 for this one.
    progress: see `Progress`.
    done: called with each shard that is finished, in this process.

  Raises:
    ConfigError: not one process or more.
    DataError: a process was killed.
  """
  if workers < 1:
    raise ConfigError(f'--workers {workers}: give 1 or more')
  progress(0, len(works))
  if workers == 1 or len(works) < 2:
    for number, (shard, work) in enumerate(works.items(), start=1):
      work()
      done(shard)
      progress(number, len(works))
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, len(works)), multiprocessing.get_context('spawn')
  )
  try:
    futures = {pool.submit(work): shard for shard, work in works.items()}
    for number, future in enumerate(
      concurrent.futures.as_completed(futures), start=1
    ):
      future.result()
      done(futures[future])
      progress(number, len(works))
  except concurrent.futures.BrokenExecutor as error:
    raise DataError(
      'a worker process was killed, perhaps for its memory: give fewer '
      '--workers; finished shards are kept'
    ) from error
  finally:
    # What has not begun would keep a failed run waiting.
    pool.shutdown(cancel_futures=True)
