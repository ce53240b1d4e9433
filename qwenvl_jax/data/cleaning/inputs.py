"""Reads the shards that cleaning starts from, one record after the other.

img2dataset's WebDataset tars and Parquet files, and JSONL with picture files
beside it. Nothing outside a shard's folder is opened and no address is fetched.
"""

import dataclasses
import glob
import os
from collections.abc import Iterator

from qwenvl_jax import buckets
from qwenvl_jax.data import roots
from qwenvl_jax.data.cleaning.pair import Outcome, Pair, Picture
from qwenvl_jax.data.readers import archives, fields, json_lines
from qwenvl_jax.data.readers.archives import PICTURES, TEXTS, Names, Sample
from qwenvl_jax.errors import BadRecordError, ConfigError, DataError

# As LAION, COYO (ViT-B/32) and DataComp (ViT-L/14) name their CLIP scores.
SCORES = (
  'similarity',
  'clip_similarity_vitb32',
  'clip_l14_similarity_score',
  'score',
)
FORMATS = (*archives.TAR_SUFFIXES, '.parquet', '.jsonl')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A data set: shards on a disk or in a bucket.

  Attributes:
    name: what reports and `ClipScore.minimum` call it.
    files: a pattern such as 'laion/*.tar', or several. Each file is a shard:
      '.tar' (WebDataset; also '.tar.gz'), '.parquet' or '.jsonl'.
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
      if not path.endswith(FORMATS):
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
  fixed = buckets.as_path(pattern)
  while glob.has_magic(str(fixed)):
    fixed = fixed.parent
  if str(fixed) == pattern:
    return [pattern] if fixed.exists() else []
  try:
    return list(
      map(str, fixed.glob(str(buckets.as_path(pattern).relative_to(fixed))))
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

  def read(self) -> Iterator[Pair | Outcome]:
    """Its records, in order, in limited memory.

    A file that ends too early or is damaged gives what comes before the damage,
    then an `Outcome` with the reason 'unreadable_record'.

    Raises:
      DataError: the file is not there.
    """
    path, source = buckets.as_path(self.path), self.source
    if not path.exists():
      raise DataError(
        f'{path} is no longer there; put it back, or clean into another folder'
      )
    names = archives.Names(
      source.pictures, source.texts, (*source.scores, 'error_message')
    )
    read = _lines if path.suffix == '.jsonl' else archives.read
    id_ = path.name
    try:
      for number, sample in enumerate(read(path, names)):
        id_ = f'{path.name}/{getattr(sample, "key", number)}'
        for found in fields.attempt(self._pair, id_, sample, names, record=id_):
          if isinstance(found, BadRecordError):
            found = self._broken(id_, found.reason, str(found)[:200])
          yield found
    except archives.NoPicturesError as error:
      yield self._broken(id_, 'missing_image', str(error))

  def _broken(self, id_: str, reason: str, detail: str) -> Outcome:
    pair = Pair(id_, self.source.name, '', Picture(b''))
    return Outcome(pair, reason, detail)

  def _pair(
    self, id_: str, sample: Sample | BadRecordError, names: Names
  ) -> Pair:
    source = self.source
    if isinstance(sample, BadRecordError):
      raise sample
    picture, text = sample.picture(names, id_), sample.text(names, id_)
    return Pair(
      id_,
      source.name,
      # Half a surrogate, which JSON may hold, cannot be written anywhere.
      text.encode('utf-8', 'replace').decode('utf-8'),
      Picture(picture),
      _number(sample.first(source.scores)),
    )


def _number(value) -> float | None:
  try:
    return None if value is None else float(value)
  except (TypeError, ValueError, OverflowError):
    return None


def _lines(path, names: Names) -> archives.Samples:
  """Objects of a JSONL file, and the pictures beside it that they name."""
  try:
    for number, (record, line) in enumerate(json_lines.lines(path)):
      if isinstance(line, BadRecordError) or line.strip():
        yield from fields.attempt(
          _line, path.parent, line, number, names, record, record=record
        )
  except DataError as error:
    yield BadRecordError('unreadable_record', str(error))


def _line(folder, line, number: int, names: Names, record: str) -> Sample:
  row = json_lines.parse(line, record)
  if not isinstance(row, dict):
    raise BadRecordError('malformed', f'{record} holds no JSON object')
  for name in names.pictures:
    if isinstance(row.get(name), str):
      row[name] = roots.read(folder, row[name], record)
  return Sample(str(row.get('id') or number), row)
