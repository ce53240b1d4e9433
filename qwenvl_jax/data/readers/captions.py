"""Captions: COCO's annotation format and Karpathy's splits."""

import collections
import dataclasses
import pathlib
from collections.abc import Hashable
from typing import Any

from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError


@dataclasses.dataclass(frozen=True)
class CocoCaptions(fields.Annotated):
  """COCO captions and NoCaps: `images` and `annotations` in one file."""

  file: str
  folder: str = ''

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record an image, with all its captions."""
    found = fields.load_json(root, self.file)
    name = pathlib.Path(self.file).stem
    captions = collections.defaultdict(list)
    for key, note in fields.entries(fields.field(found, 'annotations', name)):
      note_name = f'{name}, annotation {key}'
      for pair in fields.attempt(_caption, note, note_name, record=note_name):
        if isinstance(pair, BadRecordError):
          yield pair
        else:
          captions[pair[0]].append(pair[1])
    for key, entry in fields.entries(fields.field(found, 'images', name)):
      yield from fields.attempt(
        self._record, entry, name, captions, record=f'{name}, image {key}'
      )

  def _record(self, entry: Any, name: str, captions: dict) -> Record:
    record = f'{name}/{entry.get("id")}'
    return Record(
      id=record,
      images=(fields.text_field(entry, 'file_name', record),),
      captions=tuple(captions.get(entry.get('id'), ())),
    )


def _caption(note: Any, record: str) -> tuple[Hashable, str]:
  image = fields.field(note, 'image_id', record)
  hash(image)  # Or the record is malformed.
  return image, fields.text_field(note, 'caption', record)


@dataclasses.dataclass(frozen=True)
class Karpathy(fields.Annotated):
  """Flickr30k (and others) in Karpathy's splits: 'train', 'val', 'test'."""

  file: str
  folder: str
  split: str

  at = 'images'

  def _entry(self, key: str, entry: Any, record: str) -> fields.Found:
    record = f'{self.file}/{entry.get("imgid", entry.get("filename"))}'
    if fields.field(entry, 'split', record) == self.split:
      yield Record(
        id=record,
        images=(fields.text_field(entry, 'filename', record),),
        captions=tuple(
          fields.text_field(x, 'raw', record)
          for x in fields.field(entry, 'sentences', record)
        ),
      )
