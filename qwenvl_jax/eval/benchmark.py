"""What the paper's benchmarks share: files by data set, and their check."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qwenvl_jax.data import roots
from qwenvl_jax.data.catalogue import DATA_SETS
from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.readers.release import EvaluationLines
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError, DataError
from qwenvl_jax.eval.task import Example, File, Picture, Task

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Split:
  """A split of a data set of the catalogue, in a folder of that name.

  Attributes:
    data_set: its name in `data.catalogue`.
    name: of the split there.
  """

  data_set: str
  name: str

  @property
  def reader(self) -> Any:
    return DATA_SETS[self.data_set].splits[self.name]

  @property
  def files(self) -> tuple[File, ...]:
    entry = DATA_SETS[self.data_set]
    return tuple(
      File(f'{self.data_set}/{name}', f'{entry.put} ({entry.url})')
      for name in self.reader.files
    )

  def root(self, data_dir: pathlib.Path) -> pathlib.Path:
    return data_dir / self.data_set

  def records(self, data_dir: pathlib.Path) -> Iterator[Any]:
    """Yields records; DataError for the first that cannot be used."""
    yield from usable(self._found(self.reader.records, data_dir))

  def pairs(
    self, data_dir: pathlib.Path, leave_out_empty: bool = False
  ) -> Iterator[Any]:
    """Yields (image, `Qa`); DataError for the first that cannot be used.

    Args:
      leave_out_empty: those without question or answer; their number is
        logged.
    """
    found = self._found(self.reader.pairs, data_dir)
    if not leave_out_empty:
      yield from usable(found)
      return
    empty = 0
    for one in found:
      if isinstance(one, BadRecordError) and one.reason == 'empty_text':
        empty += 1
      else:
        yield from usable([one])
    if empty:
      _LOG.warning(
        '%s: %d questions without text or answer are left out',
        *(self.data_set, empty),
      )

  def _found(self, read: Callable, data_dir: pathlib.Path) -> Iterator[Any]:
    # What is no list at all fails where it is iterated over.
    return fields.guarded(read(self.root(data_dir)), self.reader.files[0])

  def released(
    self, data_dir: pathlib.Path, lines: str
  ) -> Iterator[Record] | None:
    """Yields records of the release's file of this split, None without it.

    Args:
      data_dir: has the data set's folder.
      lines: name of the file. Its paths begin at the release's own folder of
        data: of pictures, the names alone count.
    """
    if not (self.root(data_dir) / lines).exists():
      return None
    found = usable(EvaluationLines(lines).records(self.root(data_dir)))
    return (
      dataclasses.replace(
        record, images=(pathlib.PurePosixPath(record.images[0]).name,)
      )
      for record in found
    )

  def check_files(self, task: Task, data_dir: pathlib.Path, lines: str) -> Task:
    """A task that needs the release's file, where it is, and pictures."""
    if not (self.root(data_dir) / lines).exists():
      return task
    folder = f'{self.data_set}/{self.reader.folder}'
    needed = [file for file in task.files if file.path == folder]
    file = File(f'{self.data_set}/{lines}', 'of the release')
    return dataclasses.replace(task, files=(file, *needed))

  def picture(
    self, data_dir: pathlib.Path, name: str, record: str = ''
  ) -> Picture:
    """Returns a picture that an annotation names."""
    folder = self.reader.images_in(self.root(data_dir))
    return picture(folder, name, record or self.data_set)


@dataclasses.dataclass(frozen=True)
class Benchmark(Task):
  """A task of a known number of examples.

  Attributes:
    count: how many its authors say there are; 0 for unknown.
  """

  count: int = 0

  def check_examples(
    self, data_dir: pathlib.Path, examples: Sequence[Example], limited: bool
  ) -> None:
    """As `Task.check_examples`; some of the files are enough for a few."""
    pictures = {
      os.fspath(one.source)
      for example in examples
      for one in example.prompt.pictures
      if isinstance(one.source, (str, os.PathLike))
    }
    missing = sorted(x for x in pictures if not os.path.isfile(x))
    source = self.files[0].source
    if missing:
      raise DataError(
        f'{self.name}: {len(missing):,} of {len(pictures):,} pictures are not '
        f'there, the first is {missing[0]}; they are {source}'
      )
    count = len(examples)
    if self.count and count != self.count and not limited:
      what = 'is cut off' if count < self.count else 'holds other data, too'
      raise DataError(
        f'{self.name}: {data_dir / self.files[0].path}: {count:,} examples, '
        f'but there are {self.count:,}: the file {what}, or it is another '
        f'split; it is {source}'
      )


def figures(metric: str, *values: float) -> dict[str, dict[str, float]]:
  """The paper's figures of Qwen-VL and Qwen-VL-Chat, for `Task.paper`."""
  return {m: {metric: x} for m, x in zip(('Qwen-VL', 'Qwen-VL-Chat'), values)}


def usable(found: Iterable[Any]) -> Iterator[Any]:
  """Yields what a reader finds; raises the first error that it yields."""
  for one in found:
    if isinstance(one, DataError):
      raise one
    yield one


def each(
  found: Any, make: Callable[[Any, str], Iterator[Any]], name: str
) -> Iterator[Any]:
  """Yields what is made of each entry of a list or dict.

  Args:
    make: of an entry, and what errors call it.

  Raises:
    DataError: it is no list, or an entry has fields of another type.
  """
  for record, entry in usable(fields.guarded(fields.entries(found), name)):
    record = f'{name}, entry {record}'
    yield from usable(fields.guarded(make(entry, record), record))


def picture(folder: pathlib.Path, name: str, record: str) -> Picture:
  """Returns a picture in a folder.

  Raises:
    DataError: the name leads out of the folder.
  """
  try:
    return Picture(_inside(folder, name), name)
  except BadRecordError as error:
    raise BadRecordError(error.reason, f'{record}: {error}') from error


@functools.lru_cache(1 << 17)
def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  # Several questions about a picture follow each other.
  return roots.inside(folder, name, 'its picture')
