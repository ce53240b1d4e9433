"""Archives of samples: WebDataset tar files, and Parquet files with pictures.

Nothing is unpacked to disk, names within an archive are keys only, no path or
address that a sample holds is opened, and what is read into memory is limited.
"""

import dataclasses
import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.data.readers import fields, json_lines
from qwenvl_jax.data.roots import MAX_PICTURE
from qwenvl_jax.errors import BadRecordError, DataError

# Names of fields, the first that is there counts: what img2dataset, webdataset
# and the package `datasets` call them.
PICTURES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'image')
TEXTS = ('txt', 'caption', 'text', 'TEXT')
TAR_SUFFIXES = ('.tar', '.tar.gz', '.tgz')

# Limits, in bytes: of text or JSON, and of all that a sample holds; and how
# many members that may be.
_MAX_TEXT = 1 << 20
_MAX_SAMPLE = MAX_PICTURE + (64 << 20)
_MAX_MEMBERS = 64
# Of a tar member's extended header, and of a Parquet file's footer.
_MAX_HEADER = 1 << 20
_MAX_FOOTER = 256 << 20
# What is compressed may decode to so many bytes, or so many times its size.
# Pictures are compressed already.
_FREE_DECODED = 64 << 20
_MAX_RATIO = 100
# A Parquet file may have so many rows, or one for so many of its bytes; and so
# much of it is decoded at once.
_FREE_ROWS = 1 << 17
_ROW_BYTES = 8
_BATCH_ROWS = 64
_BATCH_BYTES = 256 << 20
# Entries of a list in a Parquet footer, which also limits how deep types nest.
_MAX_FOOTER_LIST = 5_000


@dataclasses.dataclass(frozen=True)
class Names:
  """The fields that are wanted; nothing else is read.

  Attributes:
    pictures, texts: the first that is there counts.
    others: further columns of Parquet files. The JSON of a tar is read whole.
  """

  pictures: tuple[str, ...] = PICTURES
  texts: tuple[str, ...] = TEXTS
  others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
  """What an archive holds under one key.

  Attributes:
    key: names it within the archive.
    fields: bytes of the members of a tar, by what follows the key's dot, and
      the entries of its JSON; values of the columns of a Parquet row.
  """

  key: str
  fields: dict[str, Any]

  def first(self, names: tuple[str, ...]) -> Any:
    """Returns the first field of these names that has a value, or None.

    A field has a name if it is called so, or ends in it after a dot.
    """
    for name in names:
      for field in (name, *(x for x in self.fields if x.endswith(f'.{name}'))):
        value = self.fields.get(field)
        if not fields.is_missing(value):
          return value
    return None

  def picture(self, names: Names, record: str) -> bytes:
    """Returns the encoded picture. Text is never one.

    Raises:
      BadRecordError: there is none.
    """
    value = self.first(names.pictures)
    if isinstance(value, dict):  # As the package `datasets` writes them.
      value = value.get('bytes')
    if isinstance(value, bytes) and value:
      return value
    why = self.fields.get('error_message') or 'its bytes are not there'
    raise BadRecordError('missing_image', f'{record}: no picture ({why!s:.99})')

  def text(self, names: Names, record: str) -> str:
    """Returns the text, decoded if it is bytes.

    Raises:
      BadRecordError: none, not UTF-8, or too long.
    """
    value = self.first(names.texts)
    if isinstance(value, (bytes, str)) and len(value) > _MAX_TEXT:
      raise _too_large(record, len(value))
    if isinstance(value, bytes):
      value = fields.decode(value, record)
    return fields.text_field('' if value is None else value, '', record)


class NoPicturesError(DataError):
  """A Parquet file without a column of pictures."""


Samples = Iterator[Sample | BadRecordError]


def read(path: os.PathLike, names: Names) -> Samples:
  """Yields the samples of an archive, in order, in limited memory.

  A `BadRecordError` stands for a sample that cannot be used; one with the
  reason 'unreadable_record' for all that follows the place where an archive is
  cut off or damaged.

  Raises:
    NoPicturesError: see there.
  """
  path = buckets.as_path(path)
  name = path.name
  reader = _tar if name.endswith(TAR_SUFFIXES) else _parquet
  try:
    with buckets.open_regular(path) as file:
      yield from reader(file, path, names)
  except OSError as error:
    yield _damaged(name, error, 'nothing of it can be read')


def _damaged(name: str, error: object, lost: str) -> BadRecordError:
  return BadRecordError(
    'unreadable_record',
    f'{name}: {" ".join(str(error).split())[:200]}; the file is cut off or '
    f'damaged, {lost}: download it again',
  )


class _Member(tarfile.TarInfo):
  """A member of a tar whose extended headers are limited."""

  def _proc_member(self, archive):  # The hook of tarfile for subclasses.
    if self.type in _EXTENDED and self.size > _MAX_HEADER:
      raise tarfile.ReadError(f'a header of {self.size:,} bytes')
    return super()._proc_member(archive)


_EXTENDED = (
  tarfile.GNUTYPE_LONGNAME,
  tarfile.GNUTYPE_LONGLINK,
  tarfile.XHDTYPE,
  tarfile.XGLTYPE,
  tarfile.SOLARIS_XHDTYPE,
)


@dataclasses.dataclass
class _Group:
  """The members of a tar that stand together under one key."""

  name: str
  key: str | None = None
  members: dict[str, bytes] = dataclasses.field(default_factory=dict)
  entries: dict[str, Any] = dataclasses.field(default_factory=dict)
  error: BadRecordError | None = None

  def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, field: str):
    """Reads a member; what is wrong with it is kept as the sample's error."""
    if self.error is not None:
      return
    record = f'{self.name}/{self.key}.{field}'
    try:
      data = _content(archive, member, field, record)
      field = field.removesuffix('.gz')
      if field in self.members:
        raise BadRecordError('malformed', f'{record} stands there twice')
      self.members[field] = data
      size = sum(map(len, self.members.values()))
      if size > _MAX_SAMPLE or len(self.members) > _MAX_MEMBERS:
        raise _too_large(record, size)
      if field.rpartition('.')[2] == 'json':
        self.members[field] = b''
        self.entries |= _entries(data, record)
    except BadRecordError as error:
      self.error, self.members = error, {}

  def taken(self, names: Names) -> Samples:
    """Yields the sample, if there is one."""
    if self.error is not None:
      yield self.error
    elif self.members:
      # A picture's bytes come from its own member, never from the JSON.
      own = {k: v for k, v in self.entries.items() if k not in names.pictures}
      yield Sample(self.key, own | self.members)


def _tar(file, path, names: Names) -> Samples:
  """As webdataset groups members: by path up to the base name's first dot."""
  name = path.name
  wanted = {*names.pictures, *names.texts, 'json'}
  group, most = _Group(name), None
  try:
    if not name.endswith('.tar'):
      most = _most_decoded(buckets.size(path))
      file = gzip.GzipFile(fileobj=file)
    archive = tarfile.TarFile(fileobj=file, tarinfo=_Member)
    while (member := archive.next()) is not None:
      archive.members = []  # It would remember all.
      if most is not None and archive.offset > most:
        raise EOFError(f'it decodes to more than {most:,} bytes')
      key, field = _split(member.name)
      if not member.isfile() or key is None:
        continue
      if key != group.key:
        yield from group.taken(names)
        group = _Group(name, key)
      if field.removesuffix('.gz').rpartition('.')[2] in wanted:
        group.add(archive, member, field)
    # Cut off between two members, only its end is missing.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
      raise EOFError('it does not end as an archive does')
  except (
    tarfile.TarError, OSError, EOFError, ValueError, OverflowError, LookupError,
    RecursionError, zlib.error,
  ) as error:  # fmt: skip
    # The sample that was being read may lack its last members.
    lost = f'what comes after {group.key or "its start"} is lost'
    yield _damaged(name, error, lost)
    return
  yield from group.taken(names)


def _split(path: str) -> tuple[str | None, str]:
  """Key and field of a member; no key for what webdataset passes over."""
  *folders, base = path.split('/')
  stem, dot, field = base.partition('.')
  if not (stem and dot) or '__MACOSX' in folders:
    return None, ''
  inside = [x for x in folders if x not in ('', '.', '..')]
  # Names are bytes, which need not be UTF-8.
  key = '/'.join([*inside, stem]).encode('utf-8', 'replace').decode()
  return key, field.lower()


def _content(archive, member, field: str, record: str) -> bytes:
  """The bytes of a member, decompressed."""
  if member.size > MAX_PICTURE or member.issparse():
    raise _too_large(record, member.size)
  data = archive.extractfile(member).read()
  if len(data) < member.size:
    raise tarfile.ReadError('unexpected end of data')
  if not field.endswith('.gz'):
    return data
  most = min(MAX_PICTURE, max(_MAX_TEXT, _MAX_RATIO * len(data)))
  try:
    data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
  except (OSError, EOFError, zlib.error) as error:
    raise BadRecordError('malformed', f'{record}: {error}') from error
  if len(data) > most:
    raise _too_large(record, len(data))
  return data


def _entries(data: bytes, record: str) -> dict[str, Any]:
  """The entries of a sample's JSON."""
  if len(data) > _MAX_TEXT:
    raise _too_large(record, len(data))
  found = json_lines.parse(data, record)
  if not isinstance(found, dict):
    raise BadRecordError('malformed', f'{record} holds no JSON object')
  return found


def _too_large(record: str, size: int) -> BadRecordError:
  return BadRecordError(
    'too_large', f'{record}: {size:,} bytes or more are not read'
  )


def _most_decoded(size: int) -> int:
  """How many bytes so many compressed ones may become."""
  return max(_FREE_DECODED, _MAX_RATIO * size)


def _parquet(file, path, names: Names) -> Samples:
  # Imported here: tar files do not need it, and it takes a second.
  import pyarrow
  import pyarrow.parquet

  name = path.name
  try:
    table = pyarrow.parquet.ParquetFile(
      file,
      thrift_string_size_limit=_MAX_FOOTER,
      thrift_container_size_limit=_MAX_FOOTER_LIST,
    )
    present = table.schema_arrow.names
    if not set(names.pictures) & set(present):
      raise NoPicturesError(
        f'{name} has no column of pictures ({", ".join(names.pictures)}); it '
        'is the list of URLs: run img2dataset with --output_format parquet on '
        'it'
      )
    wanted = {*names.pictures, *names.texts, *names.others, 'key'}
    columns = [x for x in present if x in wanted]
    row, decoded, most = 0, 0, _most_decoded(buckets.size(path))
    for number in range(table.num_row_groups):
      rows = _batch_rows(table, number, most, name)
      for batch in table.iter_batches(rows, [number], columns):
        decoded += batch.nbytes
        if decoded > most:
          raise _too_large(f'{name}, from row {row} on', decoded)
        for index in range(len(batch)):
          yield from _row(batch, index, name, row, names)
          row += 1
  except BadRecordError as error:
    yield error
  except (
    pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError,
    OverflowError, MemoryError,
  ) as error:  # fmt: skip
    yield _damaged(name, error, 'what follows is lost')


def _batch_rows(table, number: int, most: int, name: str) -> int:
  """Rows of a row group, of `most` bytes, that are decoded at once.

  Raises:
    BadRecordError: it would decode to more than the file can mean.
  """
  # Not the metadata of columns: where they are damaged, pyarrow 26 aborts.
  group = table.metadata.row_group(number)
  size, rows = group.total_byte_size, table.metadata.num_rows
  most_rows = max(_FREE_ROWS, most // _MAX_RATIO // _ROW_BYTES)
  if not (0 <= size <= most and 0 <= group.num_rows <= rows <= most_rows):
    raise BadRecordError(
      'too_large',
      f'{name}: {rows:,} rows, of which row group {number} becomes {size:,} '
      'bytes, are not read',
    )
  # One value may be as large as all of a column, and stand in every row.
  return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(size, 1)))


def _row(batch, index: int, name: str, row: int, names: Names) -> Samples:
  found, record = {}, f'{name}/{row}'
  for column in batch.schema.names:
    try:
      value = batch.column(column)[index].as_py()
    except UnicodeDecodeError as error:
      yield BadRecordError('invalid_utf8', f'{record}, {column}: {error}')
      return
    most = MAX_PICTURE if column in names.pictures else _MAX_TEXT
    if isinstance(value, (bytes, str)) and len(value) > most:
      yield _too_large(f'{record}, {column}', len(value))
      return
    found[column] = value
  key = found.get('key')
  yield Sample(str(row if fields.is_missing(key) else key), found)
