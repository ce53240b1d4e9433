"""TouchStone (Bai et al., 2023): open questions, scored by a judge."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import judge
from qwenvl_jax.eval.annotations.rows import embedded, rows
from qwenvl_jax.eval.benchmark import Benchmark
from qwenvl_jax.eval.task import (
  Decoding,
  Example,
  File,
  Item,
  Picture,
  Prompt,
  Scores,
)

_COLUMNS = (
  'index', 'question', 'human_annotation', 'gpt4_ha_answer', 'category',
  'task_name', 'image',
)  # fmt: skip
_SYSTEM = (
  'You are a helpful and precise assistant for checking the quality of the '
  'answer.'
)
# The judge's instructions are the benchmark: they are quoted from its
# `eval.py` (Apache-2.0).
_INSTRUCTIONS = (
  'We would like to request your feedback on the performance of two AI '
  'assistants in response to the user question and image description displayed '
  'above. AI assistants are provided with detailed image description and '
  'questions.\nPlease rate the helpfulness, relevance, accuracy, '
  'comprehensiveness of their responses. Each assistant receives an overall '
  'score on a scale of 1 to 10, where a higher score indicates better overall '
  'performance.\nPlease first output a single line containing only two values '
  'indicating the scores for Assistant 1 and 2, respectively. The two scores '
  'are separated by a space. In the subsequent line, please provide a '
  'comprehensive explanation of your evaluation, avoiding any potential bias '
  'and ensuring that the order in which the responses were presented does not '
  'affect your judgment.'
)
_QUERY = (
  '[Detailed Image Description]\n{}\n\n[Question]\n{}\n\n'
  "[The Start of Assistant 1's Answer]\n{}\n\n"
  "[The End of Assistant 1's Answer]\n\n"
  "[The Start of Assistant 2's Answer]\n{}\n\n"
  "[The End of Assistant 2's Answer]\n\n[System]\n{}\n\n"
)


@dataclasses.dataclass(frozen=True)
class TouchStone(Benchmark):
  """Answers beside GPT-4's to a description, judged in both orders.

  Attributes:
    file: the table with the pictures.
  """

  file: str = 'touchstone_20230831.tsv'

  def check(self, data_dir: pathlib.Path) -> None:
    super().check(data_dir)
    judge.check_endpoint()

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    file = data_dir / 'TouchStone' / self.file
    for record, row in rows(file, _COLUMNS, delimiter='\t'):
      for name in ('question', 'human_annotation', 'gpt4_ha_answer', 'image'):
        if not row[name]:
          raise DataError(f'{record}: {name!r} is empty')
      source = functools.partial(embedded, row['image'], record)
      yield Example(
        row['index'],
        Prompt((Picture(source, f'{record}, picture'), row['question']), True),
        target=row['gpt4_ha_answer'],
        category=row['category'] or None,
        meta={
          'description': row['human_annotation'],
          'question': row['question'],
          'task': row['task_name'],
        },
      )

  def score_all(
    self, items: Sequence[Item], folder: pathlib.Path
  ) -> list[Scores]:
    """Scores of 1 to 10, the mean of both orders; `reference` is GPT-4's.

    As in the authors' script, a reply that is not two scores does not count;
    `judged` is the share of replies that do.
    """
    questions = []
    for item in items:
      true, said = item.example.target, item.answer
      questions += [_messages(item, true, said), _messages(item, said, true)]
    replies = judge.Judge(folder / 'judge.jsonl').replies(questions)
    found = [judge.two_scores(reply) for reply in replies]
    return [_mean(a, b) for a, b in zip(found[::2], found[1::2], strict=True)]


def _messages(item: Item, first: str, second: str) -> list[dict[str, str]]:
  meta = item.example.meta
  query = _QUERY.format(
    meta['description'], meta['question'], first, second, _INSTRUCTIONS
  )
  return [
    {'role': 'system', 'content': _SYSTEM},
    {'role': 'user', 'content': query},
  ]


def _mean(first: tuple | None, swapped: tuple | None) -> Scores:
  ours, theirs = [], []
  if first:
    theirs, ours = [first[0]], [first[1]]
  if swapped:
    ours, theirs = [*ours, swapped[0]], [*theirs, swapped[1]]
  if not ours:
    return {'judged': 0.0}
  return {
    'score': sum(ours) / len(ours),
    'reference': sum(theirs) / len(theirs),
    'judged': len(ours) / 2,
  }


def _task(name: str, title: str, file: str, figure: float) -> TouchStone:
  return TouchStone(
    name,
    title,
    'score',
    Decoding(max_tokens=512),
    (
      File(
        f'TouchStone/{file}', f'{file} of https://github.com/OFA-Sys/TouchStone'
      ),
    ),
    'Picture 1: <img>{}</img>\n{} (in a chat)',
    'a judge gives both answers 1 to 10, in both orders; mean times 100',
    {'Qwen-VL-Chat': {'score': figure}},
    chat=True,
    count=908,
    file=file,
  )


TASKS = (
  _task(
    'touchstone_en', 'TouchStone, English', 'touchstone_20230831.tsv', 645.2
  ),
  _task(
    'touchstone_zh', 'TouchStone, Chinese', 'touchstone_20230831_zh.tsv', 401.2
  ),
)
