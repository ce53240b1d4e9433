"""Record files that appear whole or not at all, and the folder around them.

Folders are in the layout of TensorFlow Datasets: NAME-train.array_record-00000-
of-00004, .., and dataset_info.json, which is written last. Anything that reads
TFDS folders reads them (`tfds.builder_from_directory(FOLDER)`).
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from array_record.python import array_record_module
from etils import epath

SPLIT = 'train'
_INFO = ('features.json', 'dataset_info.json')


class Codec:
  """Records to bytes and back, by TFDS features."""

  def __init__(self, features: Mapping[str, Any]):
    # Imported here: it takes a second.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import example_serializer

    self.features = tfds.features.FeaturesDict(features)
    self._serializer = example_serializer.ExampleSerializer(
      self.features.get_serialized_info()
    )
    self._undecoded = {
      name: tfds.decode.SkipDecoding()
      for name, feature in features.items()
      if isinstance(feature, tfds.features.Image)
    }

  def encode(self, record: Mapping[str, Any]) -> bytes:
    """Pictures of a record are encoded bytes."""
    return self._serializer.serialize_example(
      self.features.encode_example(record)
    )

  def decode(self, data: bytes) -> dict[str, Any]:
    """As `encode` was given it; texts are bytes."""
    return self.features.deserialize_example_np(data, decoders=self._undecoded)


def shard_path(folder: os.PathLike, name: str, shard: int, shards: int):
  """Where TFDS looks for a shard."""
  file = f'{name}-{SPLIT}.array_record-{shard:05d}-of-{shards:05d}'
  return epath.Path(folder) / file


def write_records(path: os.PathLike, records: Iterable[bytes]) -> int:
  """Writes an array_record file; it appears when it is complete.

  Returns:
    The number of records.
  """
  count = 0
  with appearing(path) as local:
    # One record a group, so that random access reads one record.
    writer = array_record_module.ArrayRecordWriter(str(local), 'group_size:1')
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
  reader = array_record_module.ArrayRecordReader(
    os.fspath(path), 'readahead_buffer_size:1048576,max_parallelism:1'
  )
  try:
    for _ in range(reader.num_records()):
      yield reader.read()
  finally:
    reader.close()


def write_text(path: os.PathLike, text: str) -> None:
  """Writes a text file; it appears when it is complete."""
  with appearing(path) as local:
    local.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def appearing(path: os.PathLike) -> Iterator[pathlib.Path]:
  """A local file to write to, which becomes `path` if all goes well.

  However the program ends, there is a whole file or none. A killed one may
  leave a file whose name ends in '.partial', which nothing reads.
  """
  path = epath.Path(path)
  partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}.partial')
  local = pathlib.Path(os.fspath(partial))
  with contextlib.ExitStack() as stack:
    if '://' in str(path):  # A bucket: written here, then copied.
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      local = pathlib.Path(folder, 'file')
    try:
      yield local
      if '://' in str(path):
        with local.open('rb') as source, partial.open('wb') as target:
          shutil.copyfileobj(source, target, 1 << 24)
      partial.replace(path)
    except BaseException:
      with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
      raise


def remove_partial(folder: os.PathLike) -> None:
  """Removes what killed programs left in a folder."""
  for left in epath.Path(folder).glob('.*.partial'):
    left.unlink(missing_ok=True)


def is_complete(folder: os.PathLike) -> bool:
  """Whether `write_info` was reached."""
  return all((epath.Path(folder) / name).exists() for name in _INFO)


def write_info(
  folder: os.PathLike,
  name: str,
  codec: Codec,
  lengths: Sequence[int],
  description: str,
) -> None:
  """Makes the folder a data set: all of its shards are there.

  Args:
    folder: with the files of `shard_path`.
    name: of the data set.
    codec: of its records.
    lengths: records in each shard.
    description: for people.
  """
  import tensorflow_datasets as tfds

  folder = epath.Path(folder)
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder,
    dataset_name=name,
    split=SPLIT,
    filetype_suffix='array_record',
  )
  paths = [
    shard_path(folder, name, i, len(lengths)) for i in range(len(lengths))
  ]
  split = tfds.core.SplitInfo(
    name=SPLIT,
    shard_lengths=list(lengths),
    num_bytes=sum(path.stat().length for path in paths),
    filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=codec.features,
    split_infos=[split],
    filename_template=template,
    check_data=False,
    description=description,
  )
