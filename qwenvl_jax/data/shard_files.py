"""Files of records (array_record), written whole and read in order."""

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator

from qwenvl_jax import buckets


def write_records(path: os.PathLike, records: Iterable[bytes]) -> int:
  """Writes an array_record file; it appears when it is complete.

  Returns:
    The number of records.

  Raises:
    OSError: the disk is full, or refuses.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  count = 0
  with _disk_errors(path), buckets.atomic_write(path) as local:
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


@contextlib.contextmanager
def _disk_errors(path: os.PathLike) -> Iterator[None]:
  """Makes OSErrors of what array_record raises for those of a disk."""
  try:
    yield
  except RuntimeError as error:
    what, failed, cause = str(error).partition('() failed: ')
    if not failed or what not in ('open', 'write'):
      raise
    reason = cause.partition(';')[0]
    raise OSError(errno.EIO, reason, os.fspath(path)) from error


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
