"""SEED-Bench (Li et al., 2023), as the paper's section 4.5 reports it."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from qwenvl_jax.data.readers import fields
from qwenvl_jax.errors import DataError
from qwenvl_jax.eval.annotations import videos
from qwenvl_jax.eval.benchmark import each, figures, picture
from qwenvl_jax.eval.choices import LIKELIEST, Choices, lettered, letters
from qwenvl_jax.eval.task import Example, File, Picture, Prompt

_DIMENSIONS = (
  'Scene Understanding', 'Instance Identity', 'Instance Attributes',
  'Instance Location', 'Instances Counting', 'Spatial Relation',
  'Instance Interaction', 'Visual Reasoning', 'Text Understanding',
  'Action Recognition', 'Action Prediction', 'Procedure Understanding',
)  # fmt: skip
_VIDEOS = {10: 'SSV2', 11: 'EPIC-KITCHENS', 12: 'Breakfast'}
_FRAMES = 4


@dataclasses.dataclass(frozen=True)
class SeedBench(Choices):
  """SEED-Bench: nine dimensions of pictures, three of videos.

  Attributes:
    dimensions: numbers of those asked, from 1.
  """

  dimensions: range = range(1, 13)

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    root = data_dir / 'seed_bench'
    found = fields.load_json(root, 'SEED-Bench.json')
    entries = fields.field(found, 'questions', 'SEED-Bench.json')
    return each(
      entries, functools.partial(self._examples, root), 'SEED-Bench.json'
    )

  def _examples(
    self, root: pathlib.Path, entry: Any, record: str
  ) -> Iterator[Example]:
    dimension = fields.field(entry, 'question_type_id', record)
    if dimension not in self.dimensions:
      return
    key = fields.text_field(entry, 'question_id', record)
    options = [fields.text_field(entry, f'choice_{x}', record) for x in 'abcd']
    question = fields.text_field(entry, 'question', record)
    answer = fields.text_field(entry, 'answer', record)
    if answer not in tuple('ABCD'):
      raise DataError(f'{record}: {answer!r} is none of A, B, C, D')
    parts = []
    for one in self._pictures(root, entry, key, dimension, record):
      parts += [one, '\n']
    text = f'Question: {question}\nOptions: {lettered(options)}\nAnswer:'
    yield Example(
      key,
      Prompt((*parts[:-1], f'\n{text}')),
      target=answer,
      choices=letters(4),
      category=_DIMENSIONS[dimension - 1],
    )

  def _pictures(
    self, root, entry: Any, key: str, dimension: int, record: str
  ) -> list[Picture]:
    name = fields.text_field(entry, 'data_id', record)
    if dimension not in _VIDEOS:
      return [picture(root / 'SEED-Bench-image', name, record)]
    stored = root / f'video_imgs_{_FRAMES}'
    paths = [stored / f'{key}_{number}.jpg' for number in range(_FRAMES)]
    if stored.is_dir():
      return [Picture(path, path.name) for path in paths]
    if dimension == 11:
      name = name.rpartition('/')[2]
    folder = root / _VIDEOS[dimension]
    video = pathlib.Path(picture(folder, name, record).source)
    if not video.is_file():
      raise DataError(
        f'{record}: {video} is not there; get the videos as SEED-Bench says, '
        f'or put frames into {stored}'
      )
    start, end, in_seconds = None, None, True
    if 'segment' in entry:
      start, end = fields.numbers(entry['segment'], 2, record)
      in_seconds = not isinstance(entry['segment'][0], int)
    return [
      Picture(
        functools.partial(_frame, video, start, end, in_seconds, number),
        f'{name}, frame {number + 1} of {_FRAMES}',
      )
      for number in range(_FRAMES)
    ]


def _frame(video, start, end, in_seconds, number: int):
  found = videos.frames(video, _FRAMES, start, end, in_seconds)
  # A part of fewer frames ends with its last.
  return found[min(number, len(found) - 1)]


_SEED = 'https://huggingface.co/datasets/AILab-CVC/SEED-Bench'
_SEED_FILES = (
  File('seed_bench/SEED-Bench.json', f'SEED-Bench.json of {_SEED}'),
)
_SEED_PICTURES = File(
  'seed_bench/SEED-Bench-image', f'SEED-Bench-image.zip of {_SEED}, unpacked'
)


def _seed(name: str, title: str, dimensions: range, count: int, paper):
  has_pictures = dimensions[0] < 10
  return SeedBench(
    name,
    title,
    files=_SEED_FILES + (_SEED_PICTURES,) * has_pictures,
    template='<img>{}</img>\nQuestion: {}\nOptions: {}\nAnswer:',
    postprocessing=LIKELIEST,
    paper=figures('accuracy', *paper),
    count=count,
    dimensions=dimensions,
  )


TASKS = (
  _seed('seed_bench', 'SEED-Bench', range(1, 13), 19242, (56.3, 58.2)),
  _seed(
    'seed_bench_image', 'SEED-Bench, pictures', range(1, 10), 14233,
    (62.3, 65.4),
  ),
  _seed(
    'seed_bench_video', 'SEED-Bench, videos', range(10, 13), 5009,
    (39.1, 37.8),
  ),
)  # fmt: skip
