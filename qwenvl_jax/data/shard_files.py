"""Files that appear whole or not at all, on a disk or in a bucket."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator

from array_record.python import array_record_module
from etils import epath


def write_records(path: os.PathLike, records: Iterable[bytes]) -> int:
  """Writes an array_record file; it appears when it is complete.

  Returns:
    The number of records.
  """
  count = 0
  with appearing(path) as local:
    # As `storage` writes: one record is read without its neighbours.
    options = 'group_size:1,uncompressed'
    writer = array_record_module.ArrayRecordWriter(str(local), options)
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
