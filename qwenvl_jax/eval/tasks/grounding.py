"""Referring expressions: RefCOCO, +, g and GRIT, the paper's Table 6."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from qwenvl_jax import buckets, image
from qwenvl_jax.data import roots, sanitize
from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.records import Record, Region
from qwenvl_jax.errors import DataError
from qwenvl_jax.eval.benchmark import Benchmark, Split, each, figures
from qwenvl_jax.eval.metrics import boxes
from qwenvl_jax.eval.task import (
  Decoding,
  Example,
  File,
  Item,
  Picture,
  Prompt,
  Scores,
)
from qwenvl_jax.text import grounding

# Units per side of an answer, as the release's scorer has it.
_SCALE = 999


@dataclasses.dataclass(frozen=True)
class Grounding(Benchmark):
  """Phrases whose box is to be found."""

  def score(self, answer: str, example: Example) -> Scores:
    if not example.target:
      return {}
    overlap = boxes.grounding_iou(
      answer, example.target['box'], *example.target['size'], _SCALE
    )
    return {'precision': float(overlap >= boxes.THRESHOLD), 'iou': overlap}


@dataclasses.dataclass(frozen=True)
class Refer(Grounding):
  """A split of RefCOCO, RefCOCO+ or RefCOCOg.

  Attributes:
    split: as the authors publish it, `refs(unc).p` and `instances.json`.
    lines: the release's file of the same split, which is read where it is.
  """

  split: Split = Split('refcoco', 'val')
  lines: str = ''

  def check(self, data_dir: pathlib.Path) -> None:
    """As `Benchmark.check`; the release's file may stand for the authors'."""
    task = self.split.check_files(self, data_dir, self.lines)
    super(Refer, task).check(data_dir)

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    folder = self.split.reader.images_in(self.split.root(data_dir))
    for record in self._records(data_dir):
      path = roots.inside(folder, record.images[0], record.id)
      record = _shown(record, path)
      for number, region in enumerate(record.regions):
        yield _example(
          f'{record.id}/{number}',
          Picture(path, record.images[0]),
          region.phrase,
          region.boxes[0],
          record.size,
        )

  def _records(self, data_dir: pathlib.Path) -> Iterator[Record]:
    found = self.split.released(data_dir, self.lines)
    if found is None:
      yield from self.split.records(data_dir)
      return
    for record in found:
      if not record.regions:
        raise DataError(f'{record.id}: no phrase `sent` with its `bbox`')
      yield record


@dataclasses.dataclass(frozen=True)
class GritRefexp(Grounding):
  """GRIT (Gupta et al., 2022): the answers stay with its authors.

  Samples with boxes, as its examples have them, are scored; for the others a
  submission is written.

  Attributes:
    subset: 'test' or 'ablation'.
  """

  subset: str = 'test'

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    root = data_dir / 'GRIT'
    name = f'samples/{self.subset}/refexp.json'
    make = functools.partial(self._examples, root / 'images')
    return each(fields.load_json(root, name), make, name)

  def _examples(
    self, folder: pathlib.Path, sample: Any, record: str
  ) -> Iterator[Example]:
    # Flat as downloaded; nested in the authors' examples.
    given = sample.get('input', sample)
    key = 'image_id' if 'image_id' in given else 'image_path'
    name = fields.text_field(given, key, record)
    path = roots.inside(folder, name, record)
    phrase = fields.text_field(given, 'task_query', record)
    found = sample.get('output') or sample.get('gt') or {}
    regions = ()
    if found.get('bboxes'):
      box = fields.numbers(found['bboxes'][0], 4, record)
      regions = (Region(phrase, (box,)),)
    shown = _shown(Record(record, (name,), regions=regions), path)
    example = _example(
      str(given.get('example_id', record)),
      Picture(path, name),
      phrase,
      shown.regions[0].boxes[0] if regions else None,
      shown.size,
    )
    yield dataclasses.replace(example, meta={'size': list(shown.size)})

  def finish(self, items: Sequence[Item], folder: pathlib.Path) -> list[str]:
    """Writes `refexp.json` for GRIT's leaderboard; boxes in pixels."""
    found = []
    for item in items:
      box = grounding.first_box(item.answer)
      size = item.example.meta['size']
      pixels = grounding.to_pixels(box, size, _SCALE) if box else (0, 0, 1, 1)
      found.append(
        {
          'example_id': item.example.key,
          'confidence': 1.0,
          'bboxes': [[round(x) for x in pixels]],
        }
      )
    with buckets.atomic_write(folder / 'refexp.json') as path:
      path.write_text(json.dumps(found), encoding='utf-8')
    return ['refexp.json']


def _shown(record: Record, path: pathlib.Path) -> Record:
  """A record whose boxes are those of the picture as the model sees it."""
  try:
    with buckets.open_regular(path) as stream, Image.open(stream) as picture:
      size = picture.size
      turned = image.orientation(picture) >= 5
  except (OSError, ValueError, Image.DecompressionBombError) as error:
    raise DataError(
      f'{record.id}: {path} is no picture that can be read ({error}); '
      'download it again'
    ) from error
  seen = size[::-1] if turned else size
  data = path.read_bytes() if record.regions else b''
  held = dataclasses.replace(record, images=(data,))
  return dataclasses.replace(sanitize.turned(held, seen), images=record.images)


def _example(
  key: str,
  picture: Picture,
  phrase: str,
  box: Sequence[float] | None,
  size: tuple[int, int],
) -> Example:
  shown = ()
  if box is not None:
    shown = (
      tuple(x * grounding.SCALE / size[i % 2] for i, x in enumerate(box)),
    )
  return Example(
    key,
    Prompt((picture, f'<ref>{phrase}</ref><box>')),
    target=None if box is None else {'box': list(box), 'size': list(size)},
    boxes=shown,
  )


def _fields(paper: dict) -> dict:
  return {
    'metric': 'precision',
    'decoding': Decoding(max_tokens=28, min_tokens=10),
    'template': '<img>{}</img><ref>{}</ref><box>',
    'postprocessing': 'the first (x1,y1),(x2,y2) by width / 999 and '
    'height / 999; right if its overlap with the true box is 0.5 or more; '
    'wrong without a box',
    'paper': paper,
  }


def _refer(data_set: str, split: str, count: int, *paper: float) -> Refer:
  title = data_set.replace('refcoco', 'RefCOCO').replace('_plus', '+')
  release = data_set.replace('_plus', '+')
  own = Split(data_set, split)
  return Refer(
    f'{data_set}_{split}',
    f'{title} {split}',
    files=own.files,
    count=count,
    split=own,
    lines=f'{release}_{split}.jsonl',
    **_fields(figures('precision', *paper)),
  )


def _grit(subset: str, *paper: float) -> GritRefexp:
  source = 'https://github.com/allenai/grit_official, download.sh'
  return GritRefexp(
    f'grit_refexp_{subset}',
    f'GRIT refexp {subset}',
    files=(
      File(f'GRIT/samples/{subset}/refexp.json', source),
      File('GRIT/images', source),
    ),
    subset=subset,
    **_fields(figures('precision', *paper)),
  )


TASKS = (
  _refer('refcoco', 'val', 10834, 89.36, 88.55),
  _refer('refcoco', 'testA', 5657, 92.26, 92.27),
  _refer('refcoco', 'testB', 5095, 85.34, 84.51),
  _refer('refcoco_plus', 'val', 10758, 83.12, 82.82),
  _refer('refcoco_plus', 'testA', 5726, 88.25, 88.59),
  _refer('refcoco_plus', 'testB', 4889, 77.21, 76.79),
  _refer('refcocog', 'val', 4896, 85.58, 85.96),
  _refer('refcocog', 'test', 9602, 85.48, 86.32),
  _grit('test', 78.22),
  _grit('ablation'),
)
