"""Phrases and boxes: RefCOCO and its sisters, Visual Genome's regions."""

import collections
import dataclasses
import pathlib
import pickle
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.records import Record, Region
from qwenvl_jax.errors import BadRecordError, DataError


@dataclasses.dataclass(frozen=True)
class Refer(fields.Annotated):
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

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record an image, a region for each sentence."""
    found = fields.load_json(root, self.instances)
    boxes, images = (
      {
        x['id']: x
        for x in found[key]
        if isinstance(x, dict) and isinstance(x.get('id'), (int, str))
      }
      for key in ('annotations', 'images')
    )
    grouped = collections.defaultdict(list)
    for ref in load_pickle(root / self.refs):
      if not isinstance(ref, dict):
        yield BadRecordError('malformed', f'{self.refs}: {ref!r:.80}')
      elif ref.get('split') == self.split:
        grouped[str(ref.get('image_id'))].append(ref)
    for image_id, refs in grouped.items():
      yield from fields.attempt(
        self._record, refs, boxes, images,
        record=f'{self.refs}, image {image_id}',
      )  # fmt: skip

  def _record(self, refs: list, boxes: dict, images: dict) -> Record:
    image_id = refs[0].get('image_id')
    record = f'{self.refs}, image {image_id}'
    image = fields.field(images, image_id, record)
    regions = []
    for ref in refs:
      object_ = fields.field(boxes, ref.get('ann_id'), record)
      box = fields.corners(fields.field(object_, 'bbox', record), record)
      for sentence in fields.field(ref, 'sentences', record):
        regions.append(
          Region(fields.text_field(sentence, 'sent', record), (box,))
        )
    return Record(
      id=f'{self.split}/{image_id}',
      images=(fields.text_field(image, 'file_name', record),),
      size=fields.size(image, record),
      regions=tuple(regions),
    )


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
    with buckets.open_regular(file) as stream:
      return _DataOnly(stream, encoding='utf-8').load()
  except OSError as error:
    raise DataError(f'{file} cannot be read ({error.strerror})') from error
  except Exception as error:  # Damaged pickles raise whatever they run into.
    raise DataError(
      f'{file} is not a pickle of plain data ({error}); download it again from '
      'its authors'
    ) from error


@dataclasses.dataclass(frozen=True)
class VisualGenomeRegions(fields.Annotated):
  """Visual Genome's `region_descriptions.json`.

  Attributes:
    folder: where `VG_100K` and `VG_100K_2` were put together.
  """

  file: str = 'region_descriptions.json'
  folder: str = 'images'

  def _entry(self, key: str, entry: Any, record: str) -> fields.Found:
    # The size comes from the picture.
    record = f'{self.file}, image {entry.get("id")}'
    regions = []
    for region in fields.field(entry, 'regions', record):
      for found in fields.attempt(_region, region, record, record=record):
        if isinstance(found, BadRecordError):
          yield found
        else:
          regions.append(found)
    image = fields.field(entry, 'id', record)
    yield Record(str(image), (f'{image}.jpg',), regions=tuple(regions))


def _region(region: Any, record: str) -> Region:
  box = [fields.field(region, x, record) for x in _XYWH]
  phrase = fields.text_field(region, 'phrase', record)
  return Region(phrase, (fields.corners(box, record),))


_XYWH = ('x', 'y', 'width', 'height')
