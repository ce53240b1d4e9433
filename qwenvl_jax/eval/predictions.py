"""Answers on a disk: a line each, so that a run goes on where it stopped.

A line is written at once; a last one that was torn is dropped and its example
asked again. Processes that share the work write a file each and read all.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval.answering import Problem, Reply

_PATTERN = 'answers*.jsonl'


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
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / shard.file
  lock = filelock.FileLock(folder / f'.{shard.file}.lock')
  try:
    lock.acquire(blocking=False)
  except filelock.Timeout:
    raise ConfigError(
      f'{path}: another process writes it; wait for it, or name another --out'
    ) from None
  with lock:
    drop_torn(path)
    # Unbuffered: a line is one call, whole in the file when it returns.
    with path.open('ab', buffering=0) as file:
      yield file


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
  if not path.exists():
    return
  with path.open('rb+') as file:
    data = file.read()
    whole = data.rfind(b'\n') + 1
    if whole < len(data):
      file.truncate(whole)
      os.fsync(file.fileno())
