"""Files of records (array_record), written whole and read in order."""

import os
from collections.abc import Iterable, Iterator

from qwenvl_jax import buckets


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
