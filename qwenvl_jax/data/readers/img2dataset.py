"""What img2dataset writes: WebDataset tar files, or Parquet with pictures.

Nothing is unpacked to disk, and names within an archive are keys only.
"""

import dataclasses
import json
import pathlib
import tarfile
from typing import Any

from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.records import GroundedCaption, Record, Region, Span
from qwenvl_jax.errors import BadRecordError, DataError

_PICTURES = ('jpg', 'jpeg', 'png', 'webp')


@dataclasses.dataclass(frozen=True)
class Img2Dataset:
  """A folder of `00000.tar` or `00000.parquet` files.

  Attributes:
    language: of the captions.
    grounded: whether the metadata holds GRIT's `noun_chunks` and `ref_exps`.
  """

  language: str = 'en'
  grounded: bool = False

  files = ()

  def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
    """The archives, in order.

    Raises:
      DataError: there is none.
    """
    found = sorted(root.glob('**/*.tar'))
    if not found:
      found = [
        x
        for x in sorted(root.glob('**/*.parquet'))
        # Beside tar files img2dataset leaves metadata of the same ending.
        if not x.with_suffix('.tar').exists()
      ]
    if not found:
      raise DataError(
        f'{root} holds neither .tar nor .parquet files; run img2dataset with '
        '--output_format webdataset (or parquet) into it'
      )
    return found

  def read(self, part: pathlib.Path) -> fields.Found:
    """The records of an archive; one that is cut off ends with an error."""
    samples = _tar(part) if part.suffix == '.tar' else _parquet(part)
    for sample in samples:
      if isinstance(sample, BadRecordError):
        yield sample
        continue
      record = f'{part.name}/{sample["key"]}'
      try:
        yield self._record(sample, record)
      except BadRecordError as error:
        yield error

  def _record(self, sample: dict[str, Any], record: str) -> Record:
    picture = sample.get('image')
    if not picture:
      raise BadRecordError('missing_image', f'{record}: no picture')
    caption = sample.get('caption') or ''
    if isinstance(caption, bytes):
      caption = fields.decode(caption, record)
    caption = fields.text_field(caption, '', record)
    made = Record(
      id=record,
      images=(picture,),
      language=self.language,
      captions=(caption,),
    )
    return _with_boxes(made, sample['metadata']) if self.grounded else made


def _tar(part: pathlib.Path):
  """Samples: files that share a name up to the first dot."""
  key, sample = None, {}
  try:
    with tarfile.open(part, 'r:') as archive:
      for member in archive:
        if not member.isfile():
          continue
        folder, _, name = member.name.rpartition('/')
        stem, _, ending = name.partition('.')
        if (folder, stem) != key:
          if sample:
            yield sample
          key, sample = (folder, stem), {'key': stem, 'metadata': {}}
        data = archive.extractfile(member).read()
        try:
          _put(sample, ending.lower(), data, f'{part.name}/{stem}')
        except BadRecordError as error:
          key, sample = None, {}
          yield error
      # Cut off between two files, an archive looks whole but for its end.
      archive.fileobj.seek(archive.offset)
      if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * 512:
        raise EOFError('it does not end as an archive does')
  except (tarfile.TarError, OSError, EOFError) as error:
    # The sample that was being read is not whole.
    yield BadRecordError(
      'unreadable_record',
      f'{part}: {error}; the archive is cut off or damaged, what comes after '
      f'{key[1] if key else "its start"} is lost: download it again',
    )
    return
  if sample:
    yield sample


def _put(sample, ending, data, record):
  if ending in _PICTURES:
    sample['image'] = data
  elif ending == 'txt':
    sample['caption'] = data
  elif ending == 'json':
    try:
      sample['metadata'] = json.loads(fields.decode(data, record))
    except (ValueError, RecursionError) as error:
      raise BadRecordError('malformed', f'{record}.json: {error}') from error


def _parquet(part: pathlib.Path):
  import pyarrow
  import pyarrow.parquet

  try:
    file = pyarrow.parquet.ParquetFile(part)
    names = file.schema_arrow.names
    picture = next((x for x in _PICTURES if x in names), None)
    if picture is None:
      raise DataError(
        f'{part} has no column of pictures ({", ".join(_PICTURES)}); it is the '
        'list of URLs: run img2dataset with --output_format parquet on it'
      )
    # A few pictures at a time: a row group may be gigabytes.
    for batch in file.iter_batches(batch_size=64):
      columns = {name: batch.column(name) for name in names}
      for row in range(len(batch)):
        yield _row(columns, row, picture, part)
  except (pyarrow.ArrowException, OSError) as error:
    yield BadRecordError(
      'unreadable_record',
      f'{part}: {error}; the file is cut off or damaged: download it again',
    )


def _row(columns, row, picture, part):
  values = {}
  for name, column in columns.items():
    try:
      values[name] = column[row].as_py()
    except UnicodeDecodeError as error:
      return BadRecordError('invalid_utf8', f'{part.name}, row {row}: {error}')
  return {
    'key': str(values.get('key', row)),
    'image': values[picture],
    'caption': values.get('caption'),
    'metadata': values,
  }


def _with_boxes(record: Record, metadata: dict[str, Any]) -> Record:
  """GRIT: phrases of the caption with boxes in shares of the sides.

  `[start, end, x1, y1, x2, y2, score]` each; `noun_chunks` become the grounded
  caption together with `ref_exps`, which contain them, and `ref_exps` alone
  the regions.
  """
  try:
    width, height = fields.size(metadata, record.id)
    caption = metadata.get('caption')
    if not isinstance(caption, str) or not caption.strip():
      caption = record.captions[0]
    lists = {
      key: _listed(metadata.get(key)) for key in ('noun_chunks', 'ref_exps')
    }
    spans = {
      key: [_span(x, width, height) for x in entries]
      for key, entries in lists.items()
    }
  except (
    KeyError, TypeError, ValueError, IndexError, OverflowError,
    AttributeError,
  ) as error:  # fmt: skip
    raise BadRecordError(
      'malformed', f'{record.id}: GRIT metadata ({error!r})'
    ) from error
  together = fields.by_image(
    ((x.start, x.end), x) for x in spans['noun_chunks'] + spans['ref_exps']
  )
  merged = [
    Span(start, end, tuple(dict.fromkeys(b for x in found for b in x.boxes)))
    for (start, end), found in together.items()
  ]
  regions = [
    Region(caption[x.start : x.end].strip(), x.boxes)
    for x in spans['ref_exps']
    if caption[x.start : x.end].strip()
  ]
  return dataclasses.replace(
    record,
    size=(width, height),
    grounded=(GroundedCaption(caption, tuple(merged)),) if merged else (),
    regions=tuple(regions),
  )


def _listed(value) -> list:
  """Some downloads hold the lists as text."""
  return json.loads(value) if isinstance(value, str) else value or []


def _span(entry, width, height) -> Span:
  start, end, x1, y1, x2, y2 = map(float, entry[:6])
  box = (x1 * width, y1 * height, x2 * width, y2 * height)
  return Span(int(start), int(end), (box,))
