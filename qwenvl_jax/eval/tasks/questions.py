"""Questions with short answers: the paper's Tables 4 and 5, and Figure 4."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterable

from qwenvl_jax.data.records import Qa
from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import shots
from qwenvl_jax.eval.benchmark import Benchmark, Split, figures
from qwenvl_jax.eval.metrics import answers as short
from qwenvl_jax.eval.metrics import vqa_accuracy
from qwenvl_jax.eval.task import (
  Decoding,
  Example,
  Prompt,
  Scores,
  Unit,
  means,
)

_PEOPLE = 10  # who answer a question of VQAv2 and its like


def _vqa(answer: str, target: list[str]) -> Scores:
  # Readers leave empty answers out; to the scorer they are people who disagree.
  people = [*target, *[''] * (_PEOPLE - len(target))]
  return {'vqa_accuracy': vqa_accuracy(answer, people)}


def _anls(answer: str, target: list[str]) -> Scores:
  return {'anls': short.anls(answer, target)}


def _exact(answer: str, target: list[str]) -> Scores:
  return {'accuracy': max(short.exact_match(answer, x) for x in target)}


def _gqa(answer: str, target: list[str]) -> Scores:
  return {
    'accuracy': _exact(short.gqa_answer(answer), target)['accuracy'],
    'accuracy_release': _exact(short.gqa_answer_release(answer), target)[
      'accuracy'
    ],
  }


def _relaxed(answer: str, target: list[str]) -> Scores:
  return {
    'relaxed_accuracy': max(short.relaxed_accuracy(answer, x) for x in target),
    'relaxed_accuracy_release': max(
      short.relaxed_accuracy_release(answer, x) for x in target
    ),
  }


_PROCESSING = {
  _vqa: 'soft accuracy over ten people; the answer without punctuation, '
  'articles and case, numbers as digits; true answers without punctuation',
  _anls: 'lower case, white space collapsed; similarity below 0.5 is 0',
  _exact: 'equal but for case and outer white space',
  _gqa: 'up to the first .,! and what follows is, are or an article, up to of; '
  'then equal. _release: cut within words, too',
  _relaxed: 'numbers within 5% of the target, 45% = 0.45; else equal but for '
  'case. _release: within 5% of the answer',
}


@dataclasses.dataclass(frozen=True)
class ShortAnswers(Benchmark):
  """Questions about a picture that a few words answer.

  Attributes:
    splits: by category.
    train: what few-shot examples are drawn from.
    shots: how many.
    seed: of the draw.
    scoring: answer and true answers to scores.
  """

  splits: tuple[tuple[str | None, Split], ...] = ()
  train: tuple[Split, ...] = ()
  shots: int = 0
  seed: int = 0
  scoring: Callable[[str, list[str]], Scores] = _exact

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    pool = []
    if self.shots:
      pool = [
        (split, image, asked)
        for split in self.train
        for image, asked in split.pairs(data_dir, leave_out_empty=True)
      ]
    for category, split in self.splits:
      # Where nobody says how many there are, empty ones do not count.
      pairs = split.pairs(data_dir, leave_out_empty=not self.count)
      for number, (image, asked) in enumerate(pairs):
        key = asked.id or str(number)
        key = f'{category}/{key}' if len(self.splits) > 1 else key
        parts = []
        for of, other, solved in shots.draw(pool, self.shots, self.seed, key):
          picture, text = _asked(data_dir, of, other, solved)
          parts += [picture, f'{text} {solved.answer}']
        yield Example(
          key,
          Prompt((*parts, *_asked(data_dir, split, image, asked))),
          target=list(asked.answers or (asked.answer,)),
          category=category,
        )

  def score(self, answer: str, example: Example) -> Scores:
    return self.scoring(answer, example.target)


@dataclasses.dataclass(frozen=True)
class Diagrams(ShortAnswers):
  """AI2D.

  Attributes:
    lines: the release's file, which alone has its wording; read where it is.
  """

  lines: str = 'test.jsonl'

  def check(self, data_dir: pathlib.Path) -> None:
    """As `Benchmark.check`; the release's file may stand for the authors'."""
    [(_, split)] = self.splits
    task = split.check_files(self, data_dir, self.lines)
    super(Diagrams, task).check(data_dir)

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    [(_, split)] = self.splits
    found = split.released(data_dir, self.lines)
    if found is None:
      yield from super().examples(data_dir)
      return
    for record in found:
      if not record.questions:
        raise DataError(f'{record.id}: no `question` with its `answer`')
      asked = record.questions[0]
      asked = dataclasses.replace(asked, options=(), id=record.id)
      yield Example(
        record.id,
        Prompt(_asked(data_dir, split, record.images[0], asked)),
        target=list(asked.answers or (asked.answer,)),
      )


@dataclasses.dataclass(frozen=True)
class Averaged(ShortAnswers):
  """Splits that count the same, whatever their sizes."""

  def aggregate(self, units: Iterable[Unit]) -> Scores:
    groups = collections.defaultdict(list)
    for unit in units:
      groups[unit.category].append(unit.scores)
    return means(means(scores) for scores in groups.values())


def _asked(data_dir, split: Split, image: str, asked: Qa) -> tuple:
  return split.picture(data_dir, image, asked.id), f'{_worded(asked)} Answer:'


def _worded(asked: Qa) -> str:
  """The question; what may be chosen from stands behind it."""
  if not asked.options:
    return asked.question
  return f'{asked.question} Options: {", ".join(asked.options)}.'


def _task(
  name: str,
  title: str,
  splits: tuple,
  metric: str,
  scoring: Callable,
  paper: tuple[float, ...],
  count: int,
  tokens: int = 10,
  paper_metric: str = '',
  train: tuple[Split, ...] = (),
  kind: type[ShortAnswers] | None = None,
) -> ShortAnswers:
  kind = kind or (ShortAnswers if len(splits) == 1 else Averaged)
  return kind(
    name,
    title,
    metric,
    Decoding(max_tokens=tokens, min_tokens=1),
    tuple(file for _, split in splits for file in split.files),
    '<img>{}</img>{} Answer:',
    _PROCESSING[scoring],
    figures(paper_metric or metric, *paper),
    count=count,
    splits=splits,
    train=train,
    scoring=scoring,
  )


def _few_shot(task: ShortAnswers, count: int) -> ShortAnswers:
  return dataclasses.replace(
    task,
    name=f'{task.name}_{count}shot',
    title=f'{task.title}, {count} shot{"s" * (count > 1)}',
    files=(*task.files, *(x for split in task.train for x in split.files)),
    template=f'{count} x (<img>{{}}</img>{{}} Answer: {{}}), {task.template}',
    paper={},
    shots=count,
  )


def _one(data_set: str, split: str) -> tuple:
  return ((None, Split(data_set, split)),)


def _charts(*kinds: str) -> tuple:
  return tuple(
    (kind if len(kinds) > 1 else None, Split('chartqa', f'test_{kind}'))
    for kind in kinds
  )


_OKVQA = _task(
  'okvqa_val', 'OK-VQA val', _one('okvqa', 'val'), 'vqa_accuracy', _vqa,
  (58.6, 56.6), 5046, train=(Split('okvqa', 'train'),),
)  # fmt: skip
_VIZWIZ = _task(
  'vizwiz_val', 'VizWiz val', _one('vizwiz', 'val'), 'vqa_accuracy', _vqa,
  (35.2, 38.9), 4319, train=(Split('vizwiz', 'train'),),
)  # fmt: skip
_TEXTVQA = _task(
  'textvqa_val', 'TextVQA val', _one('textvqa', 'val'), 'vqa_accuracy', _vqa,
  (63.8, 61.5), 5000, train=(Split('textvqa', 'train'),),
)  # fmt: skip

TASKS = (
  _task(
    'vqav2_val', 'VQAv2 val', _one('vqav2', 'val'), 'vqa_accuracy', _vqa,
    (78.8, 78.2), 214354,
  ),
  _OKVQA,
  _VIZWIZ,
  _TEXTVQA,
  *(
    _few_shot(task, count)
    for task in (_OKVQA, _VIZWIZ, _TEXTVQA)
    for count in shots.NUMBERS
  ),
  _task(
    'gqa_testdev', 'GQA testdev balanced', _one('gqa', 'testdev'), 'accuracy',
    _gqa, (59.3, 57.5), 12578, paper_metric='accuracy_release',
  ),
  _task(
    'docvqa_val', 'DocVQA val', _one('docvqa', 'val'), 'anls', _anls,
    (65.1, 62.6), 5349, 100,
  ),
  _task(
    'chartqa_test', 'ChartQA test', _charts('human', 'augmented'),
    'relaxed_accuracy', _relaxed, (65.7, 66.3), 2500, 100,
    'relaxed_accuracy_release',
  ),
  *(
    _task(
      f'chartqa_{kind}', f'ChartQA test, {kind}', _charts(kind),
      'relaxed_accuracy', _relaxed, (), 1250, 100,
    )
    for kind in ('human', 'augmented')
  ),
  _task(
    'ai2d_test', 'AI2D test', _one('ai2d', 'test'), 'accuracy', _exact,
    (62.3, 57.7), 3088, kind=Diagrams,
  ),
  _task(
    'ocrvqa_test', 'OCR-VQA test', _one('ocrvqa', 'test'), 'accuracy', _exact,
    (75.7, 70.5), 0, 100,
  ),
)  # fmt: skip
