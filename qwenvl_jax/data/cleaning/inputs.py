"""Reads the shards that cleaning starts from, one record after the other.

img2dataset's WebDataset tars and Parquet files, and JSONL with picture files
beside it. Nothing outside a shard's folder is opened and no address is fetched.
"""

import dataclasses
import glob
import json
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from qwenvl_jax.data import roots
from qwenvl_jax.data.cleaning.pair import Broken, Pair, Picture
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

PICTURES = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'image')
TEXTS = ('caption', 'text', 'txt', 'TEXT')
# As LAION, COYO (ViT-B/32) and DataComp (ViT-L/14) name their CLIP scores.
SCORES = (
  'similarity',
  'clip_similarity_vitb32',
  'clip_l14_similarity_score',
  'score',
)
FORMATS = ('.tar', '.parquet', '.jsonl')

# A larger record of a tar is no picture that training would want.
MAX_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A data set: shards on a disk or in a bucket.

  Attributes:
    name: what reports and `ClipScore.minimum` call it.
    files: a pattern such as 'laion/*.tar', or several. Each file is a shard:
      '.tar' (WebDataset), '.parquet' or '.jsonl'.
    pictures: names of the field with the picture, the first present counts.
    texts: the same for the text.
    scores: the same for the CLIP score.
  """

  name: str
  files: str | tuple[str, ...]
  pictures: tuple[str, ...] = PICTURES
  texts: tuple[str, ...] = TEXTS
  scores: tuple[str, ...] = SCORES

  def shards(self) -> list['Shard']:
    """Its shards, by name.

    Raises:
      DataError: no file matches, or one is of an unknown format.
    """
    patterns = (self.files,) if isinstance(self.files, str) else self.files
    found = []
    for pattern in patterns:
      matches = sorted(_glob(pattern))
      if not matches:
        raise DataError(
          f'source {self.name}: no file matches {pattern!r}; check the pattern '
          '(quoted, or the shell replaces its stars)'
        )
      found += matches
    for path in found:
      if epath.Path(path).suffix not in FORMATS:
        raise DataError(
          f'source {self.name}: {path} is of an unknown format; shards are '
          f'{", ".join(FORMATS)}'
        )
    if len(set(found)) < len(found):
      raise ConfigError(
        f'source {self.name}: its patterns {patterns} match some files twice'
      )
    return [Shard(self, path) for path in found]


def _glob(pattern: str) -> list[str]:
  if '://' not in pattern:
    return glob.glob(os.path.expanduser(pattern), recursive=True)
  fixed = epath.Path(pattern)
  while glob.has_magic(str(fixed)):
    fixed = fixed.parent
  if str(fixed) == pattern:
    return [pattern] if fixed.exists() else []
  try:
    return list(
      map(str, fixed.glob(str(epath.Path(pattern).relative_to(fixed))))
    )
  except NotImplementedError as error:
    raise ConfigError(
      f'{pattern}: `**` is for disks only; name the folders of a bucket'
    ) from error


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of a source."""

  source: Source
  path: str

  def read(self) -> Iterator[Pair | Broken]:
    """Its records, in order, in constant memory.

    A file that ends too early or is damaged gives what comes before the damage,
    then one `Broken` with the reason 'damaged_shard'.

    Raises:
      DataError: the file is not there.
    """
    name = epath.Path(self.path).name
    reader = {
      '.tar': _read_tar,
      '.parquet': _read_parquet,
      '.jsonl': _read_jsonl,
    }[epath.Path(self.path).suffix]
    if not epath.Path(self.path).exists():
      raise DataError(
        f'{self.path} is no longer there; put it back, or clean into another '
        'folder'
      )
    count = 0
    try:
      for number, (key, fields) in enumerate(reader(self)):
        count = number + 1
        yield self._pair(f'{name}/{key}', fields)
    except _Damaged as error:
      yield Broken(
        f'{name}/{count}',
        self.source.name,
        'damaged_shard',
        f'after {count} records: {error}',
      )

  def _pair(self, id_: str, fields: Mapping[str, Any]) -> Pair | Broken:
    source = self.source
    picture = _first(fields, source.pictures)
    if isinstance(picture, Broken):
      return dataclasses.replace(picture, id=id_, source=source.name)
    if not isinstance(picture, bytes) or not picture:
      failed = fields.get('error_message') or 'no picture in the record'
      return Broken(id_, source.name, 'no_image', str(failed)[:200])
    text = _first(fields, source.texts)
    if isinstance(text, bytes):
      try:
        text = text.decode('utf-8')
      except UnicodeDecodeError as error:
        return Broken(id_, source.name, 'text_encoding', str(error)[:200])
    if not isinstance(text, str) or not text.strip():
      return Broken(id_, source.name, 'no_text')
    return Pair(
      id_,
      source.name,
      # Half a surrogate, which JSON may hold, cannot be written anywhere.
      text.encode('utf-8', 'replace').decode('utf-8'),
      Picture(picture),
      _number(_first(fields, source.scores)),
    )


class _Damaged(Exception):
  """The rest of the file cannot be read."""


def _first(fields, names):
  return next((fields[n] for n in names if fields.get(n) is not None), None)


def _number(value) -> float | None:
  try:
    return None if value is None else float(value)
  except (TypeError, ValueError):
    return None


def _read_tar(shard):
  """Members KEY.FIELD that stand together are a record; .json gives fields."""
  key, fields = None, {}
  try:
    with (
      epath.Path(shard.path).open('rb') as file,
      tarfile.open(fileobj=file, mode='r:') as tar,
    ):
      for member in tar:
        if not member.isfile():
          continue
        folder, base = posixpath.split(member.name)
        stem, _, field = base.partition('.')
        member_key = posixpath.join(folder, stem)
        if member_key != key:
          if fields:
            yield key, fields
          key, fields = member_key, {}
        fields.update(_tar_fields(tar, member, field.lower()))
      # Cut off between two members, only its end is missing.
      file.seek(tar.offset)
      if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise EOFError('it does not end as a tar does')
  except (tarfile.TarError, EOFError, OSError) as error:
    # The record that was being read may lack its last members.
    raise _Damaged(str(error)) from error
  if fields:
    yield key, fields


def _tar_fields(tar, member, field):
  if member.size > MAX_BYTES:
    reason = f'{member.size:,} bytes'
    return {field: Broken('', '', 'too_large', reason)}
  data = tar.extractfile(member).read()
  if len(data) < member.size:
    raise tarfile.ReadError('unexpected end of data')
  if field != 'json':
    return {field: data}
  try:
    inner = json.loads(data)
  except ValueError:  # Also where it is not UTF-8.
    return {}
  if not isinstance(inner, dict):
    return {}
  # A picture's bytes come from its own member, never from the JSON.
  return {k: v for k, v in inner.items() if k not in PICTURES}


def _read_parquet(shard):
  # Imported here: tars and JSONL do not need it.
  import pyarrow
  import pyarrow.parquet

  source = shard.source
  wanted = {
    *source.pictures, *source.texts, *source.scores,
    'key', 'error_message',
  }  # fmt: skip
  number = 0
  try:
    with epath.Path(shard.path).open('rb') as file:
      table = pyarrow.parquet.ParquetFile(file)
      columns = [name for name in table.schema_arrow.names if name in wanted]
      for batch in table.iter_batches(batch_size=64, columns=columns):
        for row in batch.to_pylist():
          # As the package `datasets` writes pictures.
          for name in source.pictures:
            if isinstance(row.get(name), dict):
              row[name] = row[name].get('bytes')
          yield str(row.get('key') or number), row
          number += 1
  except (pyarrow.ArrowException, OSError) as error:
    raise _Damaged(' '.join(str(error).split())[:200]) from error


def _read_jsonl(shard):
  folder = epath.Path(shard.path).parent
  try:
    with epath.Path(shard.path).open('rb') as file:
      for number, line in enumerate(file):
        if not line.strip():
          continue
        try:
          row = json.loads(line)
        except ValueError as error:
          row = {'error_message': f'no JSON: {error}'}
        if not isinstance(row, dict):
          row = {'error_message': 'the line holds no JSON object'}
        for name in shard.source.pictures:
          if isinstance(row.get(name), str):
            row[name] = _beside(folder, row[name])
        yield str(row.get('id') or number), row
  except OSError as error:
    raise _Damaged(str(error)) from error


def _beside(folder, name):
  """Bytes of a picture file within the folder; `Broken` if it is not there."""
  try:
    return roots.read(pathlib.Path(os.fspath(folder)), name, '')
  except BadRecordError as error:
    return Broken('', '', 'no_image', str(error))
