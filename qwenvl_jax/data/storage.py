"""Prepared data sets on disk: array_record shards that TFDS reads as well.

A record is a `tf.train.Example` of three features: `id`, `images` (encoded
pictures, stored as they came) and `annotation` (everything else, as JSON). It
is parsed here by the proto alone, several times faster than through TFDS.
"""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.data.records import Record, Scene
from qwenvl_jax.errors import BadRecordError, DataError

VERSION = '1.0.0'
INFO = 'dataset_info.json'


def serialize(record: Record | Scene) -> bytes:
  """A record whose images are bytes, as one `tf.train.Example`."""
  example = proto()[0]()
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


def parse(data: bytes, kind: type = Record) -> Any:
  """Reads a record of a kind, `Record` or `Scene`, that `serialize` wrote.

  Raises:
    BadRecordError: damaged.
  """
  example, decode_error = proto()
  try:
    feature = example.FromString(data).features.feature
    found = json.loads(feature['annotation'].bytes_list.value[0])
    found['id'] = feature['id'].bytes_list.value[0].decode()
    images = tuple(feature['images'].bytes_list.value)
    if kind is Scene:
      (found['image'],) = images
    else:
      found['images'] = images
    return _reader(kind)(found)
  except (
    ValueError, LookupError, TypeError, AttributeError, decode_error,
  ) as error:  # fmt: skip
    raise BadRecordError(
      'unreadable_record', f'a damaged record ({error}); prepare it again'
    ) from error


parse_scene = functools.partial(parse, kind=Scene)


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
  """Returns what makes a value of a type of what JSON holds."""
  if dataclasses.is_dataclass(kind):
    types = typing.get_type_hints(kind)
    readers = {name: _reader(found) for name, found in types.items()}
    return lambda found: kind(**{k: readers[k](v) for k, v in found.items()})
  if typing.get_origin(kind) is tuple:
    part = _reader(typing.get_args(kind)[0])
    return tuple if part is _same else lambda found: tuple(map(part, found))
  return _same


def _same(value: Any) -> Any:
  return value


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


@functools.cache
def proto() -> tuple[type, type[Exception]]:
  """Imports what records are stored as, and its error, which takes a second."""
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example, DecodeError


def folder(base: str | os.PathLike, name: str) -> pathlib.Path:
  """Where a prepared data set is or would be."""
  return buckets.as_path(base) / name / VERSION


def shard_name(name: str, split: str, index: int, count: int) -> str:
  """Returns the file name of a shard, as TFDS has it."""
  return f'{name}-{split}.array_record-{index:05d}-of-{count:05d}'


def write_records(path: os.PathLike, records: Iterable[bytes]) -> int:
  """Writes an array_record file; it appears when it is complete.

  Returns:
    The number of records.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  count = 0
  with buckets.atomic_write(path) as local:
    # One record a chunk, so that one is read without its neighbours; pictures
    # are compressed already.
    writer = ArrayRecordWriter(str(local), 'group_size:1,uncompressed')
    try:
      for record in records:
        writer.write(record)
        count += 1
    finally:
      writer.close()
  return count


def read_records(path: os.PathLike) -> Iterator[bytes]:
  """All records of a file, in order.

  Raises:
    RuntimeError, ValueError, IndexError: the file is damaged.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  with buckets.local_copy(path) as local:
    reader = ArrayRecordReader(
      os.fspath(local), 'readahead_buffer_size:1048576,max_parallelism:1'
    )
    try:
      for _ in range(reader.num_records()):
        yield reader.read()
    finally:
      reader.close()


def write_shard(path: os.PathLike, records: Iterable[Record | Scene]) -> int:
  """Writes a shard, whole or not at all; returns the number of records."""
  return write_records(path, map(serialize, records))


def write_info(
  directory: pathlib.Path, name: str, lengths: dict[str, Sequence[int]], **about
) -> None:
  """Writes what makes the shards a TFDS data set, if that has changed.

  `about` holds `description`, `homepage` and `license`.
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
  text = tfds.features.Text()
  info = tfds.core.DatasetInfo(
    builder=tfds.core.dataset_info.DatasetIdentity(
      name=name,
      version=tfds.core.Version(VERSION),
      data_dir=os.fspath(directory),
      module_name='',
    ),
    # Pictures are bytes: TFDS would decode them by rules that are not ours.
    features=tfds.features.FeaturesDict(
      {'id': text, 'images': tfds.features.Sequence(text), 'annotation': text}
    ),
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


def split_sizes(directory: pathlib.Path) -> dict[str, int]:
  """Number of records of each split; empty if it is not prepared."""
  return {k: sum(v) for k, v in split_lengths(directory).items()}


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
