"""Prepared data sets on disk: array_record shards that TFDS reads as well.

A record is a `tf.train.Example` of three features: `id`, `images` (encoded
pictures, stored as they came) and `annotation` (everything else, as JSON). It
is parsed here by the proto alone, several times faster than through TFDS.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.data import shard_files
from qwenvl_jax.data.records import (
  GroundedCaption,
  Object,
  Qa,
  Record,
  Region,
  Scene,
  Span,
  Turn,
  Word,
)
from qwenvl_jax.errors import BadRecordError, DataError

VERSION = '1.0.0'
INFO = 'dataset_info.json'


def serialize(record: Record | Scene) -> bytes:
  """A record whose images are bytes, as one `tf.train.Example`."""
  example = _example_class()()
  feature = example.features.feature
  images = [record.image] if isinstance(record, Scene) else record.images
  feature['id'].bytes_list.value.append(record.id.encode('utf-8', 'replace'))
  feature['images'].bytes_list.value.extend(map(bytes, images))
  annotation = json.dumps(
    _to_json(record, without=('id', 'image', 'images')),
    ensure_ascii=False,
    separators=(',', ':'),
  )
  # Strangers' text may hold halves of surrogate pairs.
  feature['annotation'].bytes_list.value.append(
    annotation.encode('utf-8', 'replace')
  )
  return example.SerializeToString(deterministic=True)


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
  try:
    yield
  except (
    ValueError, KeyError, IndexError, TypeError, AttributeError,
    _decode_error(),
  ) as error:  # fmt: skip
    raise BadRecordError(
      'unreadable_record', f'a damaged record ({error}); prepare it again'
    ) from error


def _read_example(data: bytes) -> tuple[str, tuple[bytes, ...], dict]:
  """Id, images and annotation."""
  feature = _example_class().FromString(data).features.feature
  return (
    feature['id'].bytes_list.value[0].decode(),
    tuple(feature['images'].bytes_list.value),
    json.loads(feature['annotation'].bytes_list.value[0]),
  )


def parse(data: bytes) -> Record:
  """The inverse of `serialize`.

  Raises:
    BadRecordError: damaged.
  """
  with _damage_told():
    id_, images, found = _read_example(data)
    return Record(
      id=id_,
      images=images,
      size=tuple(found.get('size', (0, 0))),
      language=found.get('language', 'en'),
      captions=tuple(found.get('captions', ())),
      questions=tuple(_qa(x) for x in found.get('questions', ())),
      regions=tuple(
        Region(x['phrase'], _boxes(x)) for x in found.get('regions', ())
      ),
      grounded=tuple(_grounded(x) for x in found.get('grounded', ())),
      words=_words(found),
      turns=tuple(Turn(x['role'], x['text']) for x in found.get('turns', ())),
      text=found.get('text', ''),
      texts=tuple(found.get('texts', ())),
    )


def parse_scene(data: bytes) -> Scene:
  """The inverse of `serialize`, of a scene.

  Raises:
    BadRecordError: damaged.
  """
  with _damage_told():
    id_, (image,), found = _read_example(data)
    return Scene(
      id=id_,
      image=image,
      side=found['side'],
      objects=tuple(
        Object(x['thing'], tuple(x['box'])) for x in found['objects']
      ),
      colour=found['colour'],
      texture=found.get('texture', 'plain'),
      words=_words(found),
    )


def _words(found: dict) -> tuple[Word, ...]:
  return tuple(
    Word(x['word'], tuple(map(tuple, x['quad'])))
    for x in found.get('words', ())
  )


def _qa(found: dict) -> Qa:
  lists = {k: tuple(v) for k, v in found.items() if k in ('answers', 'options')}
  return Qa(**{**found, **lists})


def _boxes(found: dict) -> tuple:
  return tuple(map(tuple, found['boxes']))


def _grounded(found: dict) -> GroundedCaption:
  spans = (Span(x['start'], x['end'], _boxes(x)) for x in found['spans'])
  return GroundedCaption(found['text'], tuple(spans))


def _to_json(value: Any, without: Sequence[str] = ()) -> Any:
  """Dataclasses as dicts, without what is empty anyway."""
  if dataclasses.is_dataclass(value):
    fields = {f.name: f.default for f in dataclasses.fields(value)}
    return {
      name: _to_json(getattr(value, name))
      for name, default in fields.items()
      if name not in without and getattr(value, name) not in (default, '')
    }
  if isinstance(value, (tuple, list)):
    return [_to_json(x) for x in value]
  return value


def prepare_imports() -> None:
  """Imports what `serialize` and `parse` need, which takes a second."""
  _example_class()
  _decode_error()


@functools.cache
def _example_class():
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example


@functools.cache
def _decode_error():
  from google.protobuf.message import DecodeError

  return DecodeError


def folder(base: str | os.PathLike, name: str) -> pathlib.Path:
  """Where a prepared data set is or would be."""
  return buckets.as_path(base) / name / VERSION


def shard_name(name: str, split: str, index: int, count: int) -> str:
  """Returns the file name of a shard, as TFDS has it."""
  return f'{name}-{split}.array_record-{index:05d}-of-{count:05d}'


def write_shard(path: pathlib.Path, records: Iterable[Record]) -> int:
  """Writes a shard, whole or not at all; returns the number of records."""
  return shard_files.write_records(path, map(serialize, records))


def write_info(
  directory: pathlib.Path, name: str, lengths: dict[str, Sequence[int]], **about
) -> None:
  """Writes what makes the shards a TFDS data set, if that has changed.

  Args:
    directory: of the shards.
    name: of the data set.
    lengths: records of each shard, by split.
    **about: `description`, `homepage`, `license`.
  """
  if split_lengths(directory) == lengths:
    return
  # Imported here: it takes a second, and only preparing needs it.
  import tensorflow_datasets as tfds

  template = tfds.core.ShardedFileTemplate(
    data_dir=directory, dataset_name=name, filetype_suffix='array_record'
  )
  splits = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=list(counts),
      num_bytes=sum(
        buckets.size(directory / shard_name(name, split, i, len(counts)))
        for i in range(len(counts))
      ),
      filename_template=template.replace(split=split),
    )
    for split, counts in lengths.items()
  ]
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name=name,
      version=tfds.core.Version(VERSION),
      data_dir=os.fspath(directory),
      module_name='',
    ),
    features=features(),
    **about,
  )
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  info.set_splits(tfds.core.splits.SplitDict(splits))
  with tempfile.TemporaryDirectory() as folder:
    info.write_to_directory(folder)
    # Without `INFO`, the rest does not count.
    made = sorted(pathlib.Path(folder).iterdir(), key=lambda x: x.name == INFO)
    for file in made:
      buckets.copy(file, directory / file.name)


def features():
  """What a record is to TFDS: a `tfds.features.FeaturesDict`.

  Pictures are bytes: TFDS would decode them by rules that are not ours.
  """
  import tensorflow_datasets as tfds

  text = tfds.features.Text()
  return tfds.features.FeaturesDict(
    {'id': text, 'images': tfds.features.Sequence(text), 'annotation': text}
  )


def split_lengths(directory: pathlib.Path) -> dict[str, list[int]]:
  """Records of each shard, by split; empty if it is not prepared.

  Raises:
    DataError: the folder is damaged.
  """
  file = directory / INFO
  if not file.exists():
    return {}
  try:
    splits = json.loads(file.read_text())['splits']
    return {x['name']: list(map(int, x['shardLengths'])) for x in splits}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DataError(
      f'{file} cannot be read ({error}); delete it and prepare again, which '
      'keeps finished shards'
    ) from error


def open_split(directory: pathlib.Path, name: str, split: str):
  """The serialized records of a split, by random access; picklable.

  Raises:
    DataError: no such split, or shards that are missing or damaged.
  """
  import grain

  lengths = split_lengths(directory)
  if split not in lengths:
    raise DataError(
      f'{directory} has no split {split!r}; it has '
      f'{", ".join(map(repr, lengths)) or "none: prepare it first"}'
    )
  count = len(lengths[split])
  paths = [directory / shard_name(name, split, i, count) for i in range(count)]
  # One listing: a bucket would be asked for every shard.
  there = {path.name for path in directory.iterdir()}
  missing = [path.name for path in paths if path.name not in there]
  if missing:
    raise DataError(
      f'{directory} lacks {len(missing)} of {count} shards, e.g. {missing[0]}; '
      'run `qwenvl-data prepare` again, which keeps the others'
    )
  # Grain reports on every source that it opens to a log that is not set up.
  try:
    return grain.sources.ArrayRecordDataSource([str(path) for path in paths])
  except (OSError, ValueError, RuntimeError) as error:
    raise DataError(
      f'a shard of {directory} cannot be opened ({error}); `qwenvl-data '
      f'prepare {name} --again`, or what else made it, writes it anew'
    ) from error
