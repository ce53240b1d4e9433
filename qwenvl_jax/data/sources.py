"""Where records come from: prepared folders and packages, by random access.

A source is a small frozen description (gin binds it); `open()` gives the
sequence of records, which can be pickled to worker processes.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.data import records, storage, things
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

VOCABULARY = 'qwen.tiktoken'

_VERSION = re.compile(r'\d+\.\d+\.\d+')


def default_data_dir() -> pathlib.Path:
  """Where `qwenvl-data prepare` writes and pipelines read by default."""
  return pathlib.Path('~/.cache/qwenvl_jax/data').expanduser()


def data_path(data_dir: str | os.PathLike | None) -> pathlib.Path:
  if data_dir is None:
    return default_data_dir()
  return buckets.as_path(data_dir)


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
      option = '' if self.data_dir is None else f' --data_dir {self.data_dir}'
      raise DataError(
        f'{self.name} is not prepared; run `qwenvl-data prepare {self.name}'
        f'{option} --manual_dir ...` (`qwenvl-data list --name {self.name}` '
        'tells where to get it)'
      )
    return RecordSequence(
      storage.open_split(folder, self.name, self.split), self.limit
    )


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
    shards: serialized records, by random access.
    limit: only the first so many; None for all.
  """

  shards: Any
  limit: int | None = None

  def __len__(self) -> int:
    size = len(self.shards)
    return size if self.limit is None else min(size, self.limit)

  def __getitem__(self, index: int) -> records.Record:
    """A record.

    Raises:
      BadRecordError: it is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      data = self.shards[index]
    except (OSError, ValueError, RuntimeError) as error:
      _check_reachable(error)
      raise BadRecordError(
        'unreadable_record', f'record {index} of {self.shards} ({error})'
      ) from error
    return storage.parse(data)


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

  def open(self) -> 'SceneSequence':
    """The scenes.

    Raises:
      DataError: not prepared, or damaged.
      ConfigError: no such split.
    """
    folder = scenes_folder(self.data_dir, self.config)
    sequence = SceneSequence(folder, self.split)
    chosen = None
    if self.min_objects or self.max_objects is not None:
      counts = sequence.object_counts()
      most = counts.max() if self.max_objects is None else self.max_objects
      chosen = np.flatnonzero((self.min_objects <= counts) & (counts <= most))
    if self.limit is not None:
      chosen = np.arange(len(sequence)) if chosen is None else chosen
      chosen = chosen[: self.limit]
    if chosen is not None and not len(chosen):
      counts = sequence.object_counts()
      raise ConfigError(
        f'Scenes(min_objects={self.min_objects}, '
        f'max_objects={self.max_objects}, limit={self.limit}) leaves none: the '
        f'scenes of {folder} have {counts.min()} to {counts.max()} objects'
      )
    return dataclasses.replace(sequence, chosen=chosen)


def scenes_folder(data_dir, config: str = 'default') -> pathlib.Path:
  """The newest prepared version of a set of scenes."""
  base = data_path(data_dir)
  # Not the folder of a preparation that was interrupted.
  found = sorted(
    (
      file
      for file in (base / 'scenes' / config).glob('*/dataset_info.json')
      if _VERSION.fullmatch(file.parent.name)
    ),
    key=lambda file: tuple(map(int, file.parent.name.split('.'))),
  )
  if not found:
    option = '' if data_dir is None else f' --data_dir {data_dir}'
    kind = '' if config == 'default' else f' --config {config}'
    raise DataError(
      f'{base / "scenes" / config} holds no prepared scenes; run `qwenvl-data '
      f'prepare scenes{kind}{option}`'
    )
  return found[-1].parent


def prepared_configs(data_dir) -> list[str]:
  """Names of the sets of scenes in a data folder."""
  found = []
  for folder in sorted((data_path(data_dir) / 'scenes').glob('*')):
    with contextlib.suppress(DataError):
      scenes_folder(data_dir, folder.name)
      found.append(folder.name)
  return found


def split_sizes(folder: pathlib.Path) -> dict[str, int]:
  """Number of records of each split of a prepared folder."""
  return {k: sum(v) for k, v in storage.split_lengths(folder).items()}


def small_vocabulary(data_dir: str | os.PathLike | None = None) -> str:
  """The vocabulary that `qwenvl-data prepare scenes` wrote beside the data.

  Raises:
    DataError: not prepared.
  """
  file = data_path(data_dir) / VOCABULARY
  if not file.exists():
    option = '' if data_dir is None else f' --data_dir {data_dir}'
    raise DataError(
      f'{file} is missing; run `qwenvl-data prepare scenes{option}`'
    )
  return str(file)


@dataclasses.dataclass(frozen=True)
class SceneSequence:
  """Scenes of one split, read when indexed.

  Attributes:
    folder: the prepared version.
    split: name of the split.
    chosen: indices of the scenes that count; None for all.
  """

  folder: pathlib.Path
  split: str
  chosen: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self._source) if self.chosen is None else len(self.chosen)

  def __getitem__(self, index: int) -> records.Scene:
    if not 0 <= index < len(self):
      raise IndexError(index)
    if self.chosen is not None:
      index = int(self.chosen[index])
    return self._read(index)

  def object_counts(self) -> np.ndarray:
    """[N] int32, the number of objects of every scene of the split."""
    file = self.folder / f'objects-{self.split}.npy'
    if file.exists():
      with file.open('rb') as stream:
        return np.load(stream)
    count = len(self._source)
    counts = [len(self._read(i).objects) for i in range(count)]
    return np.array(counts, np.int32)

  def _read(self, index):
    try:
      return _scene(self._source[index], self._side)
    except (OSError, ValueError, IndexError, RuntimeError) as error:
      raise DataError(
        f'{self.folder}, split {self.split!r}, scene {index}: cannot be read '
        f'({error}); delete the folder and run `qwenvl-data prepare scenes`'
      ) from error

  @property
  def _source(self):
    return _open_split(self.folder, self.split)[0]

  @property
  def _side(self) -> int:
    return _open_split(self.folder, self.split)[1]


@functools.lru_cache(maxsize=16)
def _open_split(folder, split):
  # Imported here: it takes a second, and only reading needs it.
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
  except (OSError, ValueError, KeyError, RuntimeError) as error:
    raise DataError(
      f'{folder} cannot be read ({error}); delete it and run `qwenvl-data '
      'prepare scenes`'
    ) from error
  if split not in builder.info.splits:
    raise ConfigError(
      f'{folder} has no split {split!r}; it has '
      f'{", ".join(map(repr, builder.info.splits))}'
    )
  source = builder.as_data_source(
    split=split, decoders={'image': tfds.decode.SkipDecoding()}
  )
  return source, builder.info.features['image'].shape[0]


def _scene(record, side) -> records.Scene:
  texture = record['texture']
  words = zip(record['words'], record['quads'].tolist())
  return records.scene(
    record['id'].decode(),
    record['image'],
    side,
    [
      records.Object(int(thing), tuple(box))
      for thing, box in zip(record['things'], record['boxes'].tolist())
    ],
    int(record['colour']),
    things.TEXTURES[int(texture)],
    [
      records.Word(word.decode(), tuple(map(tuple, quad)))
      for word, quad in words
    ],
  )


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

  def open(self) -> list[records.Asked]:
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
      asked = json.loads((folder / 'questions.json').read_text())
    except (OSError, ValueError) as error:
      raise DataError(
        f'{folder}/questions.json cannot be read ({error}); run `pip install '
        '--force-reinstall easy-vqa==1.0`'
      ) from error
    by_picture = {}
    for question, answer, picture in asked:
      by_picture.setdefault(picture, []).append((question, answer))
    return [
      records.Asked(
        f'easy_vqa/{self.split}/{picture:05d}',
        str(folder / 'images' / f'{picture}.png'),
        tuple(pairs),
      )
      for picture, pairs in sorted(by_picture.items())[: self.limit]
    ]


def _easy_vqa_folder() -> pathlib.Path:
  # Found without importing the package: only its files are wanted.
  spec = importlib.util.find_spec('easy_vqa')
  if spec is None or spec.origin is None:
    raise DataError('easy-vqa is missing; run `pip install easy-vqa==1.0`')
  return pathlib.Path(spec.origin).parent / 'data'
