"""Documents of texts and pictures in order: MMC4's and OBELICS' layouts.

One document a line of JSONL (or an entry of JSON), with paths of downloaded
pictures relative to the file's folder:

  MMC4      {'text_list': ['One.', 'Two.'], 'image_info': [{'image_name':
            'a.jpg', 'matched_text_index': 1}]}: `a.jpg` stands before 'Two.'
  OBELICS   {'texts': ['One.', null, 'Two.'], 'images': [null, 'a.jpg', null]}

Parquet files hold columns of these names, and pictures as bytes or as the
package `datasets` writes them: no path of theirs is opened. A document goes on
without pictures that are not there, which is counted; `--again` reads those
that were put there since.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

from qwenvl_jax.data import roots
from qwenvl_jax.data.readers import archives, fields, json_lines
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError

_COLUMNS = archives.Names(
  pictures=('images', 'image_info'), texts=(), others=('texts', 'text_list')
)

# What is asked for where an entry is nothing of the kind.
DOCUMENT = (
  "{'texts': ['One.', null, ..], 'images': [null, 'a.jpg', ..]} as in OBELICS, "
  "or {'text_list': [..], 'image_info': [{'image_name': 'a.jpg', "
  "'matched_text_index': 1}, ..]} as in MMC4"
)


@dataclasses.dataclass(frozen=True)
class Interleaved(fields.Reader):
  """Every `.jsonl`, `.json` and `.parquet` file of a folder.

  Attributes:
    folder: where the images are, relative to a file; '' for beside it.
    language: 'en' or 'zh'.
  """

  folder: str = ''
  language: str = 'en'

  def parts(self, root: pathlib.Path) -> list[pathlib.Path]:
    return fields.files(root, ('.jsonl', '.json', '.parquet'))

  def read(self, part: pathlib.Path) -> fields.Found:
    """Yields a record for each document, its pictures read."""
    found, base = json_lines.entries(part), part.parent / self.folder
    if part.suffix == '.parquet':
      found, base = _rows(part), None
    for record, entry in found:
      yield from fields.attempt(
        self._record, entry, base, record, record=record
      )

  def _record(
    self, entry: Any, base: pathlib.Path | None, record: str
  ) -> Record:
    images, texts, notes, missing = [], [''], [], None
    join, parts = _parts(entry, record)
    json_lines.check_count(sum(x for x, _ in parts), record)
    for is_picture, value in parts:
      if not is_picture:
        texts[-1] = join.join(filter(None, (texts[-1], value)))
        continue
      try:
        images.append(_picture(value, base, record))
      except BadRecordError as error:
        missing = error
        notes.append('missing_picture')
      else:
        texts.append('')
    if not any(x.strip() for x in texts):
      raise BadRecordError('empty_text', f'{record}: a document without text')
    if not images:
      raise missing or BadRecordError(
        'missing_image', f'{record}: a document without pictures'
      )
    return Record(
      record,
      tuple(images),
      language=self.language,
      texts=tuple(texts),
      notes=tuple(notes),
    )


def _rows(part: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields a name and the columns of every row of a Parquet file."""
  for sample in archives.read(part, _COLUMNS):
    if isinstance(sample, BadRecordError):
      yield part.name, sample
    else:
      yield f'{part.name}/{sample.key}', sample.fields


def _picture(value: Any, base: pathlib.Path | None, record: str) -> bytes:
  """Returns the bytes of a picture, from its file if there is a folder."""
  data = value.get('bytes') if isinstance(value, dict) else value
  if isinstance(data, bytes) and data:
    return data
  name = json_lines.picture_path(value, record)
  if base is None:
    raise BadRecordError(
      'missing_image',
      f'{record}: {name[:80]!r} is no picture; put its bytes into the file, or '
      'write documents with paths as JSONL',
    )
  return roots.read(base, name, record)


def _parts(entry: Any, record: str) -> tuple[str, list[tuple[bool, Any]]]:
  """Returns what joins texts, and (is it a picture?, text or picture) pairs."""
  if isinstance(entry, BadRecordError):
    raise entry
  entry = entry if isinstance(entry, dict) else {}
  for keys, join, read in (
    (('text_list', 'image_info'), ' ', _matched),
    (('texts', 'images'), '\n\n', _parallel),
  ):
    lists = [entry.get(key) for key in keys]
    if all(isinstance(x, list) for x in lists):
      parts = [x for x in read(*lists) if not fields.is_missing(x[1])]
      if all(is_picture or isinstance(x, str) for is_picture, x in parts):
        return join, parts
  raise BadRecordError(
    'malformed', f'{record}: no document, which is {DOCUMENT}'
  )


def _matched(texts: list, pictures: list) -> list[tuple[bool, Any]]:
  """MMC4: pictures in any order, each before the text that it matches."""
  before = [[] for _ in range(len(texts) + 1)]
  for picture in pictures:
    picture = picture if isinstance(picture, dict) else {}
    index = picture.get('matched_text_index')
    known = isinstance(index, int) and 0 <= index <= len(texts)
    # A picture that matches no text comes last.
    before[index if known else -1].append(
      (True, picture.get('image_name') or '')
    )
  parts = []
  for found, text in zip(before, [*texts, None]):
    parts += [*found, (False, text)]
  return parts


def _parallel(texts: list, pictures: list) -> list[tuple[bool, Any]]:
  """OBELICS: two lists of one length; of a pair, the picture comes first."""
  return [
    part
    for text, picture in itertools.zip_longest(texts, pictures)
    for part in ((True, picture), (False, text))
  ]
