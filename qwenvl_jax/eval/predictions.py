"""Answers on a disk: a line each, so that a run goes on where it stopped.

A line is written at once; a last one that was torn is dropped and its example
asked again. Processes that share the work write a file each and read all.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from qwenvl_jax import buckets
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval.answering import Problem, Reply

_PATTERN = 'answers*.jsonl'

# Between two copies of lines in a bucket.
_SAVE_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Shard:
  """The share of one process: each `count`-th example in the order of keys."""

  index: int = 0
  count: int = 1

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise ConfigError(
        f'--shard={self.index}/{self.count}: the first number counts from 0 '
        'and stays below the second, as 0/4 to 3/4'
      )

  @property
  def file(self) -> str:
    if self.count == 1:
      return 'answers.jsonl'
    return f'answers.{self.index}-of-{self.count}.jsonl'


ALL = Shard()


@dataclasses.dataclass(frozen=True)
class Line:
  """What is known of an example.

  Attributes:
    asked: digest of what was asked (`prompting.digest`).
  """

  asked: str
  said: Reply | Problem

  def write(self, file: BinaryIO, key: str) -> None:
    """Appends the line; the example is `key`."""
    line = {'key': key, 'asked': self.asked}
    if isinstance(self.said, Problem):
      line |= {'problem': self.said.reason, 'message': self.said.message}
    else:
      line['text'] = self.said.text
      if self.said.losses:
        line['losses'] = self.said.losses
    # Halves of surrogate pairs are escaped; the rest stays readable.
    text = json.dumps(line, ensure_ascii=False)
    data = text.encode('utf-8', 'backslashreplace') + b'\n'
    file.write(data)


def read(folder: Path) -> dict[str, Line]:
  """Reads what all processes have written of a task.

  A key that is there twice counts once; an answer is more than a problem.

  Raises:
    DataError: a line that is none; names file and line.
  """
  found = {}
  for file in sorted(folder.glob(_PATTERN)):
    for number, line in enumerate(file.read_bytes().splitlines(True), 1):
      if not line.endswith(b'\n'):
        continue  # Torn, or being written.
      key, parsed = _parse(line, f'{file}, line {number}')
      old = found.get(key)
      if old is None or isinstance(old.said, Problem):
        found[key] = parsed
  return found


@contextlib.contextmanager
def appending(folder: Path, shard: Shard) -> Iterator[BinaryIO]:
  """Opens a process's file of a task to append lines.

  Raises:
    ConfigError: another process has it open.
  """
  buckets.make_folder(folder)
  path = folder / shard.file
  if buckets.in_bucket(folder):  # There are no locks.
    with lines_to(path) as file:
      yield file
    return
  lock = filelock.FileLock(folder / f'.{shard.file}.lock')
  try:
    lock.acquire(blocking=False)
  except filelock.Timeout:
    raise ConfigError(
      f'{path}: another process writes it; wait for it, or name another --out'
    ) from None
  with lock, lines_to(path) as file:
    yield file


@contextlib.contextmanager
def lines_to(path: Path) -> Iterator[BinaryIO]:
  """Opens a file to append lines; a last one that was torn is dropped.

  On a disk, a line is whole in the file when `write` returns. Objects of a
  bucket cannot be appended to: one is written anew every half minute and at the
  end, so that a kill loses the lines of half a minute.
  """
  if buckets.in_bucket(path):
    with contextlib.closing(_Object(path)) as file:
      yield file
    return
  drop_torn(path)
  # Unbuffered: a line is one call.
  with path.open('ab', buffering=0) as file:
    yield file


class _Object:
  """Lines of an object in a bucket."""

  def __init__(self, path: Path):
    self._path = path
    self._data = bytearray(path.read_bytes() if path.exists() else b'')
    self._saved = time.monotonic()

  def write(self, line: bytes) -> None:
    self._data += line
    if time.monotonic() - self._saved >= _SAVE_SECONDS:
      self.close()

  def close(self) -> None:
    buckets.write(self._path, bytes(self._data))
    self._saved = time.monotonic()


def _parse(line: bytes, name: str) -> tuple[str, Line]:
  try:
    entry = json.loads(line)
    if 'problem' in entry:
      said = Problem(entry['problem'], entry['message'])
    else:
      said = Reply(entry['text'], tuple(entry.get('losses', ())))
    return entry['key'], Line(entry['asked'], said)
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(
      f'{name} is no line of answers ({error!r:.80}); remove it, and its '
      'example is asked again'
    ) from error


def drop_torn(path: Path) -> None:
  """Removes the last line of a file if it has no end: a write was killed."""
  # An object appears whole.
  if buckets.in_bucket(path) or not path.exists():
    return
  with path.open('rb+') as file:
    data = file.read()
    whole = data.rfind(b'\n') + 1
    if whole < len(data):
      file.truncate(whole)
      os.fsync(file.fileno())
