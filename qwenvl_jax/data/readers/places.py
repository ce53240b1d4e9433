"""Phrases and boxes: RefCOCO and its sisters, Visual Genome's regions."""

import dataclasses
import pathlib
import pickle

from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.records import Record, Region
from qwenvl_jax.errors import BadRecordError, DataError


@dataclasses.dataclass(frozen=True)
class Refer:
  """RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them.

  Attributes:
    split: 'train', 'val', 'testA', 'testB' or 'test'.
    refs: `refs(unc).p` or `refs(umd).p`.
    instances: COCO's boxes of the same objects.
    folder: COCO's train2014.
  """

  split: str
  refs: str = 'refs(unc).p'
  instances: str = 'instances.json'
  folder: str = 'train2014'

  @property
  def files(self) -> tuple[str, ...]:
    return self.refs, self.instances, self.folder

  def images_in(self, root: pathlib.Path) -> pathlib.Path:
    return root / self.folder

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record an image, a region for each sentence."""
    found = fields.load_json(root, self.instances)
    boxes = {x['id']: x['bbox'] for x in found['annotations']}
    images = {x['id']: x for x in found['images']}
    grouped = fields.by_image(
      (x.get('image_id'), x)
      for x in load_pickle(root / self.refs)
      if x.get('split') == self.split
    )
    for image_id, refs in grouped.items():
      record = f'{self.refs}, image {image_id}'
      try:
        image = fields.field(images, image_id, record)
        regions = [
          Region(
            fields.text_field(sentence, 'sent', record),
            (
              fields.corners(fields.field(boxes, ref.get('ann_id'), record),
              record),
            ),
          )
          for ref in refs
          for sentence in fields.field(ref, 'sentences', record)
        ]  # fmt: skip
        yield Record(
          id=f'{self.split}/{image_id}',
          images=(fields.text_field(image, 'file_name', record),),
          size=fields.size(image, record),
          regions=tuple(regions),
        )
      except (BadRecordError, KeyError) as error:
        if isinstance(error, KeyError):
          error = BadRecordError('malformed', f'{record}: no {error}')
        yield error


class _DataOnly(pickle.Unpickler):
  """Reads lists, dicts, text and numbers; anything else could run code."""

  def find_class(self, module, name):
    raise pickle.UnpicklingError(f'it wants to import {module}.{name}')


def load_pickle(file: pathlib.Path) -> list:
  """The contents of a pickle that holds nothing but data.

  Raises:
    DataError: missing, damaged, or one that would run code.
  """
  try:
    with open(file, 'rb') as stream:
      return _DataOnly(stream, encoding='utf-8').load()
  except OSError as error:
    raise DataError(f'{file} cannot be read ({error.strerror})') from error
  except Exception as error:  # Damaged pickles raise whatever they run into.
    raise DataError(
      f'{file} is not a pickle of plain data ({error}); download it again from '
      'its authors'
    ) from error


@dataclasses.dataclass(frozen=True)
class VisualGenomeRegions:
  """Visual Genome's `region_descriptions.json`.

  Attributes:
    folder: where `VG_100K` and `VG_100K_2` were put together.
  """

  file: str = 'region_descriptions.json'
  folder: str = 'images'

  @property
  def files(self) -> tuple[str, ...]:
    return self.file, self.folder

  def images_in(self, root: pathlib.Path) -> pathlib.Path:
    return root / self.folder

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record an image; its size comes from the picture."""
    for entry in fields.load_json(root, self.file):
      record = f'{self.file}, image {entry.get("id")}'
      try:
        regions = []
        for region in fields.field(entry, 'regions', record):
          try:
            box = [fields.field(region, x, record) for x in _XYWH]
            phrase = fields.text_field(region, 'phrase', record)
            regions.append(Region(phrase, (fields.corners(box, record),)))
          except BadRecordError as error:
            yield error
        image = fields.field(entry, 'id', record)
        yield Record(str(image), (f'{image}.jpg',), regions=tuple(regions))
      except BadRecordError as error:
        yield error


_XYWH = ('x', 'y', 'width', 'height')
