"""MME (Fu et al., 2023), as the paper's section 4.5 reports it."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from qwenvl_jax.eval.annotations import mme
from qwenvl_jax.eval.benchmark import Benchmark
from qwenvl_jax.eval.metrics.answers import yes_or_no
from qwenvl_jax.eval.task import (
  Decoding,
  Example,
  File,
  Item,
  Picture,
  Prompt,
  Scores,
  Unit,
)

# Subtask -> questions, two a picture.
PERCEPTION = {
  'existence': 60, 'count': 60, 'position': 60, 'color': 60, 'posters': 294,
  'celebrity': 340, 'scene': 400, 'landmark': 400, 'artwork': 400, 'OCR': 40,
}  # fmt: skip
COGNITION = {
  'commonsense_reasoning': 140,
  'numerical_calculation': 40,
  'text_translation': 40,
  'code_reasoning': 40,
}
SUBTASKS = PERCEPTION | COGNITION


@dataclasses.dataclass(frozen=True)
class Mme(Benchmark):
  """Fourteen subtasks of yes or no, two questions a picture.

  A subtask scores the share of right answers plus that of pictures with both
  right, in percent; the totals are sums over ten and four subtasks.
  """

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    for subtask in SUBTASKS:
      asked = collections.Counter()
      for question in mme.questions(data_dir / 'MME', subtask):
        name = f'{subtask}/{question.picture.name}'
        asked[name] += 1
        yield Example(
          f'{name}/{asked[name]}',
          # The release's query: the picture has no number.
          Prompt(
            (Picture(question.picture, name), f'\n{question.text}'),
            chat=True,
            numbered=False,
          ),
          target=question.answer,
          group=name,
          category=subtask,
        )

  def parse(self, text: str, example: Example) -> str:
    del example
    return yes_or_no(text)

  def score(self, answer: str, example: Example) -> Scores:
    return {'accuracy': float(answer == example.target)}

  def combine(self, items: Sequence[Item]) -> Scores:
    right = [item.scores['accuracy'] for item in items]
    return {
      'accuracy': float(np.mean(right)),
      'accuracy_plus': float(all(right)),
    }

  def aggregate(self, units: Sequence[Unit]) -> Scores:
    """Both totals, up to 2000 and 800; of the subtasks that were asked."""
    groups = collections.defaultdict(list)
    for unit in units:
      groups[unit.category].append(unit)
    totals = collections.defaultdict(float)
    for subtask, found in groups.items():
      total = 'cognition' if subtask in COGNITION else 'perception'
      totals[total] += _score(found)
    return dict(totals)


def _score(units: Sequence[Unit]) -> float:
  # A picture counts by its questions, which are two everywhere.
  accuracy = np.mean([unit.scores['accuracy'] for unit in units])
  plus = np.mean([unit.scores['accuracy_plus'] for unit in units])
  return float(100 * (accuracy + plus))


_SOURCE = (
  'MME_Benchmark_release_version, from the authors: '
  'https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models'
)

TASKS = (
  Mme(
    'mme',
    'MME',
    'perception',
    # The score reads four characters.
    Decoding(max_tokens=10),
    tuple(File(f'MME/{subtask}', _SOURCE) for subtask in SUBTASKS),
    '<img>{}</img>\n{} (in a chat)',
    'yes or no in the first four characters, else wrong; accuracy of questions '
    'plus accuracy of pictures with both right, summed over subtasks',
    {'Qwen-VL-Chat': {'perception': 1487.58, 'cognition': 360.71}},
    scale=1.0,
    chat=True,
    count=sum(SUBTASKS.values()),
  ),
)
