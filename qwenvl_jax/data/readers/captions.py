"""Captions: COCO's annotation format and Karpathy's splits."""

import dataclasses
import pathlib

from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.records import Record
from qwenvl_jax.errors import BadRecordError


@dataclasses.dataclass(frozen=True)
class CocoCaptions:
  """COCO captions and NoCaps: `images` and `annotations` in one file.

  Attributes:
    file: the annotations.
    folder: where the images are; '' for the download folder.
  """

  file: str
  folder: str = ''

  @property
  def files(self) -> tuple[str, ...]:
    return tuple(x for x in (self.file, self.folder) if x)

  def images_in(self, root: pathlib.Path) -> pathlib.Path:
    return root / self.folder

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record an image, with all its captions."""
    found = fields.load_json(root, self.file)
    name = pathlib.Path(self.file).stem
    captions = fields.by_image(
      (fields.field(x, 'image_id', name), x)
      for x in fields.field(found, 'annotations', name)
    )
    for entry in fields.field(found, 'images', name):
      record = f'{name}/{entry.get("id")}'
      try:
        texts = captions.get(entry.get('id'), ())
        yield Record(
          id=record,
          images=(fields.text_field(entry, 'file_name', record),),
          captions=tuple(
            fields.text_field(x, 'caption', record) for x in texts
          ),
        )
      except BadRecordError as error:
        yield error


@dataclasses.dataclass(frozen=True)
class Karpathy:
  """Flickr30k (and others) in Karpathy's splits.

  Attributes:
    file: `dataset_flickr30k.json`.
    folder: where the images are.
    split: 'train', 'val' or 'test'.
  """

  file: str
  folder: str
  split: str

  @property
  def files(self) -> tuple[str, ...]:
    return self.file, self.folder

  def images_in(self, root: pathlib.Path) -> pathlib.Path:
    return root / self.folder

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record an image, with all its captions."""
    found = fields.load_json(root, self.file)
    for entry in fields.field(found, 'images', self.file):
      record = f'{self.file}/{entry.get("imgid", entry.get("filename"))}'
      try:
        if fields.field(entry, 'split', record) != self.split:
          continue
        yield Record(
          id=record,
          images=(fields.text_field(entry, 'filename', record),),
          captions=tuple(
            fields.text_field(x, 'raw', record)
            for x in fields.field(entry, 'sentences', record)
          ),
        )
      except BadRecordError as error:
        yield error
