"""What img2dataset writes: WebDataset tar files, or Parquet with pictures."""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from qwenvl_jax.data.readers import archives, fields
from qwenvl_jax.data.records import GroundedCaption, Record, Region, Span
from qwenvl_jax.errors import BadRecordError, DataError

_NAMES = archives.Names(
  others=('width', 'height', 'noun_chunks', 'ref_exps', 'error_message')
)


@dataclasses.dataclass(frozen=True)
class Img2Dataset(fields.Reader):
  """A folder of `00000.tar` or `00000.parquet` files.

  Attributes:
    language: of the captions.
    grounded: whether the metadata holds GRIT's `noun_chunks` and `ref_exps`.
  """

  language: str = 'en'
  grounded: bool = False
  folder = ''

  def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
    """The archives, in order; of Parquet files, only where there is no tar.

    Raises:
      DataError: there is none.
    """
    for endings in (archives.TAR_SUFFIXES, ('.parquet',)):
      with contextlib.suppress(DataError):
        return fields.files(root, endings, '**/*')
    raise DataError(
      f'{root} holds neither .tar nor .parquet files; run img2dataset with '
      '--output_format webdataset (or parquet) into it'
    )

  def read(self, part: pathlib.Path) -> fields.Found:
    """The records of an archive; one that is cut off ends with an error."""
    for sample in archives.read(part, _NAMES):
      if isinstance(sample, BadRecordError):
        yield sample
      else:
        record = f'{part.name}/{sample.key}'
        yield from fields.attempt(self._record, sample, record, record=record)

  def _record(self, sample: archives.Sample, record: str) -> Record:
    made = Record(
      id=record,
      images=(sample.picture(_NAMES, record),),
      language=self.language,
      captions=(sample.text(_NAMES, record),),
    )
    return _with_boxes(made, sample.fields) if self.grounded else made


def _with_boxes(record: Record, metadata: dict[str, Any]) -> Record:
  """GRIT: phrases of the caption with boxes in shares of the sides.

  `[start, end, x1, y1, x2, y2, score]` each; `noun_chunks` become the grounded
  caption together with `ref_exps`, which contain them, and `ref_exps` alone
  the regions.
  """
  width, height = fields.size(metadata, record.id)
  caption = metadata.get('caption')
  if not isinstance(caption, str) or not caption.strip():
    caption = record.captions[0]
  spans = {
    key: [_span(x, width, height, caption) for x in _listed(metadata.get(key))]
    for key in ('noun_chunks', 'ref_exps')
  }
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


def _span(entry, width, height, caption) -> Span:
  start, end, x1, y1, x2, y2 = map(float, entry[:6])
  if not 0 <= start < end <= len(caption):
    raise ValueError(f'characters {start:g} to {end:g} of {len(caption)}')
  box = (x1 * width, y1 * height, x2 * width, y2 * height)
  return Span(int(start), int(end), (box,))
