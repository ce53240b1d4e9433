"""Where records come from: prepared folders and packages, by random access.

A source is a small frozen description (gin binds it); `open()` gives the
sequence of records, which can be pickled to worker processes.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.data import records, sharded_job, storage
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

VOCABULARY = 'qwen.tiktoken'


def default_data_dir() -> pathlib.Path:
  """Where `qwenvl-data prepare` writes and pipelines read by default."""
  return pathlib.Path('~/.cache/qwenvl_jax/data').expanduser()


def data_path(data_dir: str | os.PathLike | None) -> pathlib.Path:
  """Returns the folder of prepared data; None is the default one."""
  if data_dir is None:
    return default_data_dir()
  return buckets.as_path(data_dir)


def option(data_dir: str | os.PathLike | None) -> str:
  """Returns what names the folder on a command line; '' for the default one."""
  return '' if data_dir is None else f' --data_dir {data_dir}'


def disk_path(data_dir: str | os.PathLike | None) -> pathlib.Path:
  """Where data is prepared.

  Raises:
    ConfigError: in a bucket, which preparing cannot write.
  """
  path = data_path(data_dir)
  if buckets.in_bucket(path):
    raise ConfigError(
      f'{path}: data is prepared on a disk, and copied: name a folder, then '
      f'gcloud storage rsync -r FOLDER {path}'
    )
  return path


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A data set written by `qwenvl-data prepare NAME`.

  Attributes:
    name: of the data set.
    split: which part.
    data_dir: the folder given to `prepare`; None for the default one.
    limit: only the first so many records; None for all.
  """

  name: str
  split: str = 'train'
  data_dir: str | os.PathLike | None = None
  limit: int | None = None

  def open(self) -> 'RecordSequence':
    """The records.

    Raises:
      DataError: not prepared, or shards are missing.
    """
    folder = storage.folder(data_path(self.data_dir), self.name)
    if not (folder / storage.INFO).exists():
      raise DataError(
        f'{self.name} is not prepared; run `qwenvl-data prepare {self.name}'
        f'{option(self.data_dir)} --manual_dir ...` (`qwenvl-data list --name '
        f'{self.name}` tells where to get it)'
      )
    shards = storage.open_split(folder, self.name, self.split)
    chosen = None if self.limit is None else range(len(shards))[: self.limit]
    return RecordSequence(self.name, shards, chosen)


def _check_reachable(error: Exception) -> None:
  """Tells a bucket that cannot be read from a bad record, which is left out.

  Raises:
    DataError: it cannot be read.
  """
  text = str(error)
  # So array_record says that it has not got as far as looking at a record.
  if 'gs://' in text and 'from the underlying reader' in text:
    raise DataError(
      f'{text}. May this account read the bucket, is the object there, and '
      'does the network reach it?'
    ) from error


@dataclasses.dataclass(frozen=True)
class RecordSequence:
  """Records of a prepared split, read when indexed.

  Attributes:
    name: of the data set.
    shards: serialized records, by random access.
    chosen: indices of the records that count; None for all.
    parse: makes a record of what `shards` holds.
  """

  name: str
  # Grain asks for the representation with every record: it must be short.
  shards: Any = dataclasses.field(repr=False)
  chosen: Sequence[int] | None = dataclasses.field(default=None, repr=False)
  parse: Callable[[bytes], Any] = dataclasses.field(
    default=storage.parse, repr=False
  )

  def __len__(self) -> int:
    return len(self.shards if self.chosen is None else self.chosen)

  def __getitem__(self, index: int) -> records.Record | records.Scene:
    """A record.

    Raises:
      BadRecordError: it is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    if self.chosen is not None:
      index = int(self.chosen[index])
    try:
      data = self.shards[index]
    except (OSError, ValueError, RuntimeError) as error:
      _check_reachable(error)
      raise BadRecordError(
        'unreadable_record',
        f'record {index} of {self.shards} ({error}); `qwenvl-data prepare '
        f'{self.name} --again`, or what else made it, writes it anew',
      ) from error
    return self.parse(data)


@dataclasses.dataclass(frozen=True)
class Scenes:
  """Composed scenes, prepared by `qwenvl-data prepare scenes`.

  Attributes:
    data_dir: the folder given to `prepare`; None for the default one.
    split: 'train', 'test' or 'combos'.
    config: which set of scenes, 'default' unless prepared otherwise.
    min_objects: only scenes with at least so many objects.
    max_objects: only scenes with at most so many objects; None for all.
    limit: only the first so many scenes; None for all.
  """

  data_dir: str | os.PathLike | None = None
  split: str = 'train'
  config: str = 'default'
  min_objects: int = 0
  max_objects: int | None = None
  limit: int | None = None

  def open(self) -> RecordSequence:
    """The scenes.

    Raises:
      DataError: not prepared, damaged, or no such split.
      ConfigError: no scene is left.
    """
    folder = scenes_folder(self.data_dir, self.config)
    shards = storage.open_split(folder, 'scenes', self.split)
    counts = sharded_job.notes(folder, 'scenes', self.split, 'objects')
    counts = np.array(counts)
    most = counts.max() if self.max_objects is None else self.max_objects
    chosen = np.flatnonzero((self.min_objects <= counts) & (counts <= most))
    chosen = chosen[: self.limit]
    if not len(chosen):
      raise ConfigError(
        f'Scenes(min_objects={self.min_objects}, '
        f'max_objects={self.max_objects}, limit={self.limit}) leaves none: the '
        f'scenes of {folder} have {counts.min()} to {counts.max()} objects'
      )
    return RecordSequence('scenes', shards, chosen, storage.parse_scene)


def scenes_folder(data_dir, config: str = 'default') -> pathlib.Path:
  """Returns the folder where a set of scenes was prepared.

  Raises:
    DataError: it was not; says the command.
  """
  base = data_path(data_dir) / 'scenes'
  folder = storage.folder(base, config)
  if not (folder / storage.INFO).exists():
    kind = '' if config == 'default' else f' --config {config}'
    raise DataError(
      f'{base / config} holds no prepared scenes; run `qwenvl-data prepare '
      f'scenes{kind}{option(data_dir)}`'
    )
  return folder


def prepared_configs(data_dir) -> list[str]:
  """Names of the sets of scenes in a data folder."""
  there = f'*/{storage.VERSION}/{storage.INFO}'
  found = (data_path(data_dir) / 'scenes').glob(there)
  return sorted(file.parents[1].name for file in found)


def small_vocabulary(data_dir: str | os.PathLike | None = None) -> str:
  """The vocabulary that `qwenvl-data prepare scenes` wrote beside the data.

  Raises:
    DataError: not prepared.
  """
  file = data_path(data_dir) / VOCABULARY
  if not file.exists():
    raise DataError(
      f'{file} is missing; run `qwenvl-data prepare scenes{option(data_dir)}`'
    )
  return str(file)


@dataclasses.dataclass(frozen=True)
class EasyVqa:
  """easy-VQA (Victor Zhou, MIT): simple shapes, 13 answers.

  4,000 pictures of 64 px to train on and 1,000 to test, from PyPI.

  Attributes:
    split: 'train' or 'test'.
    limit: only the first so many pictures; None for all.
  """

  split: str = 'train'
  limit: int | None = None

  def open(self) -> list[records.Record]:
    """Every picture with all its questions.

    Raises:
      DataError: the package is missing.
      ConfigError: no such split.
    """
    if self.split not in ('train', 'test'):
      raise ConfigError(
        f"EasyVqa.split={self.split!r} is neither 'train' nor 'test'"
      )
    folder = _easy_vqa_folder() / self.split
    try:
      entries = json.loads((folder / 'questions.json').read_text())
    except (OSError, ValueError) as error:
      raise DataError(
        f'{folder}/questions.json cannot be read ({error}); run `pip install '
        '--force-reinstall easy-vqa==1.0`'
      ) from error
    by_picture = {}
    for question, answer, picture in entries:
      asked = records.Qa(question, answer)
      by_picture.setdefault(picture, []).append(asked)
    return [
      records.Record(
        f'easy_vqa/{self.split}/{picture:05d}',
        (str(folder / 'images' / f'{picture}.png'),),
        questions=tuple(asked),
      )
      for picture, asked in sorted(by_picture.items())[: self.limit]
    ]


def _easy_vqa_folder() -> pathlib.Path:
  # Found without importing the package: only its files are wanted.
  spec = importlib.util.find_spec('easy_vqa')
  if spec is None or spec.origin is None:
    raise DataError('easy-vqa is missing; run `pip install easy-vqa==1.0`')
  return pathlib.Path(spec.origin).parent / 'data'
