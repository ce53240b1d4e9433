"""Held-out questions about composed scenes: the quickstart's examination.

A question is asked with the picture, and its wording once more with a grey one:
what is right then was not read from pixels.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.data import formats, questions, sources
from qwenvl_jax.data.examples import END, Question
from qwenvl_jax.data.records import Qa, ScenePair
from qwenvl_jax.errors import DataError
from qwenvl_jax.eval.metrics import boxes as box_metrics
from qwenvl_jax.eval.task import (
  Decoding,
  Example,
  Item,
  Picture,
  Prompt,
  Scores,
  Task,
)
from qwenvl_jax.text import grounding

# Kinds of questions that the quickstart has floors for, and the others.
WITH_FLOOR = ('caption', 'exist', 'count', 'colour', 'refer')
OTHERS = ('left_of', 'side', 'name_box', 'grounded_caption', 'ocr', 'read')

# Classes of things in the data.
CLASSES = 16

# Of the pixels of a blank picture: nothing to see, and no colour's name.
_GREY = (128, 128, 128)

# Grounded captions are the longest answers, in tokens.
_MAX_TOKENS = 112


@dataclasses.dataclass(frozen=True)
class Answered:
  """A question, what the model said, and whether that counts.

  Attributes:
    answer: decoded text without the end token.
    correct: by the rule of its kind, see `score`.
    iou: of the first box with the first true one, for answers with boxes.
  """

  question: Question
  answer: str
  correct: bool
  iou: float | None = None


def judge(question: Question, answer: str) -> Answered:
  """Whether an answer is right.

  Captions and short answers must equal the reference. Boxes count by the
  paper's precision@1: intersection over union of at least 0.5 with every true
  box, in order; OCR needs every word and its quad's box.
  """
  answer = answer.strip()
  if question.kind == 'ocr':
    return _score_ocr(question, answer)
  if not question.boxes:
    return Answered(question, answer, answer == question.reference)
  found = [
    box for place in grounding.parse(answer).places for box in place.boxes
  ]
  overlaps = [
    box_metrics.iou(ours, true)
    for ours, true in zip(found, question.boxes, strict=False)
  ]
  correct = len(found) == len(question.boxes) and all(
    overlap >= box_metrics.THRESHOLD for overlap in overlaps
  )
  if question.kind == 'grounded_caption':
    words = _without_boxes(answer) == _without_boxes(question.reference)
    correct = correct and words
  return Answered(question, answer, correct, overlaps[0] if overlaps else 0.0)


def _without_boxes(text: str) -> list[str]:
  return [place.ref for place in grounding.parse(text).places]


def _score_ocr(question: Question, answer: str) -> Answered:
  def read(text):
    return {
      place.ref: _bounds(place.quads[0])
      for place in grounding.parse(text).places
      if place.quads
    }

  found, true = read(answer), read(question.reference)
  overlaps = [
    box_metrics.iou(found[word], box)
    for word, box in true.items()
    if word in found
  ]
  correct = found.keys() == true.keys() and all(
    overlap >= box_metrics.THRESHOLD for overlap in overlaps
  )
  return Answered(question, answer, correct, overlaps[0] if overlaps else 0.0)


def _bounds(quad) -> tuple[float, ...]:
  xs, ys = quad[0::2], quad[1::2]
  return min(xs), min(ys), max(xs), max(ys)


@dataclasses.dataclass(frozen=True)
class SceneTask(Task):
  """Questions about one split of the scenes, or of easy-VQA.

  Items are scored `right`, and `blank` for the same question about the grey
  picture.

  Attributes:
    split: 'test', 'combos' (combinations of thing and colour that were held
      out), or 'easy_vqa'.
    kinds: of questions; those that a scene does not allow are left out.
    scenes: how many; fewer if there are fewer.
    config: which set of scenes.
    pairs: ask about two scenes at a time, instead of `kinds`.
  """

  split: str = 'test'
  kinds: Sequence[str] = WITH_FLOOR
  scenes: int = 500
  config: str = 'default'
  pairs: bool = False

  def check(self, data_dir: Path) -> None:
    if not data_dir.is_dir():
      raise DataError(
        f'{self.name}: {data_dir}: no such folder; the quickstart makes it '
        '(bash launch/quickstart.sh), or qwenvl-data prepare scenes'
      )

  def examples(self, data_dir: Path) -> Iterator[Example]:
    blanks = set()
    for pictures, asked in self._questions(data_dir):
      for number, question in enumerate(asked):
        yield self._example(question, number, pictures)
        blank = self._blank(question, len(pictures))
        # Grey pictures are all alike: a wording is asked once.
        if blank.key not in blanks:
          blanks.add(blank.key)
          yield blank

  def _questions(
    self, data_dir: Path
  ) -> Iterator[tuple[list[Picture], list[Question]]]:
    if self.split == 'easy_vqa':
      for record in sources.EasyVqa('test', limit=self.scenes).open():
        asked = [_of_easy_vqa(record.id, x) for x in record.questions]
        yield [Picture(record.images[0], record.id)], asked
      return
    split = sources.Scenes(
      str(data_dir), self.split, self.config, limit=self.scenes
    )
    before = None
    for scene in split.open():
      shown, about, kinds = [scene], scene, self.kinds
      if self.pairs and before is None:
        before = scene
        continue
      if self.pairs:
        shown = [before, scene]
        about, kinds, before = ScenePair(*shown), questions.PAIR_KINDS, None
      asked = questions.held_out(about, kinds, classes=CLASSES, chat=self.chat)
      yield [Picture(x.image, x.id) for x in shown], asked

  def _example(
    self, question: Question, number: int, pictures: Sequence[Picture]
  ) -> Example:
    return Example(
      key=f'{question.record}/{number}',
      prompt=Prompt((*pictures, question.prompt), chat=self.chat),
      target=question.reference,
      category=f'{row_name(question)} ({question.language})',
      boxes=question.boxes,
      meta=dataclasses.asdict(question),
    )

  def _blank(self, question: Question, count: int) -> Example:
    wording = hashlib.sha256(question.prompt.encode()).hexdigest()[:16]
    return Example(
      key=f'blank/{wording}',
      prompt=Prompt(
        (*[Picture(_grey, 'grey')] * count, question.prompt), chat=self.chat
      ),
    )

  def score_all(self, items: Sequence[Item], folder: Path) -> list[Scores]:
    blind = {
      item.example.prompt.parts[-1]: item.text
      for item in items
      if not item.example.meta
    }
    return [
      self._scores(item, blind) if item.example.meta else {} for item in items
    ]

  def _scores(self, item: Item, blind: dict[str, str]) -> Scores:
    question = question_of(item)
    scores = {'right': float(judge(question, item.text).correct)}
    if question.prompt in blind:
      answer = blind[question.prompt]
      scores['blank'] = float(judge(question, answer).correct)
    return scores


def _of_easy_vqa(record: str, asked: Qa) -> Question:
  prompt, answer = formats.vqa('en', asked.question, asked.answer)
  answer = answer.text.removesuffix(END)
  return Question('vqa', 'easy_vqa', 'en', prompt.text, answer, record)


def _grey() -> Image.Image:
  return Image.new('RGB', (8, 8), _GREY)


def question_of(item: Item) -> Question:
  """The question that an item was made of."""
  found = item.example.meta
  return Question(**found | {'boxes': tuple(map(tuple, found['boxes']))})


@dataclasses.dataclass(frozen=True)
class Score:
  """One row of the table: share of right answers.

  Attributes:
    blank: of the same model with blank pictures.
    majority: of always giving the most frequent reference.
  """

  name: str
  language: str
  count: int
  accuracy: float
  blank: float
  majority: float


def tabulate(items: Sequence[Item]) -> list[Score]:
  """Scores by kind and language; referring by number of objects, too."""
  groups = collections.defaultdict(list)
  for item in items:
    if item.example.meta:
      question = question_of(item)
      groups[row_name(question), question.language].append(item)
  rows = []
  for (name, language), found in groups.items():
    references = collections.Counter(item.example.target for item in found)
    rows.append(
      Score(
        name=name,
        language=language,
        count=len(found),
        accuracy=float(np.mean([item.scores['right'] for item in found])),
        blank=float(np.mean([item.scores['blank'] for item in found])),
        majority=references.most_common(1)[0][1] / len(found),
      )
    )
  return rows


def row_name(question: Question) -> str:
  """What a question counts under."""
  if question.kind != 'refer':
    return question.kind
  if question.objects == 1:
    return 'refer, one object'
  if len(question.boxes) == 1:
    return 'refer, several objects'
  return 'refer, several boxes'


def _task(name: str, title: str, **settings) -> SceneTask:
  return SceneTask(
    name,
    title,
    'right',
    Decoding(max_tokens=_MAX_TOKENS),
    template='{}',
    postprocessing='boxes count from an intersection over union of 0.5 with '
    'the true ones, in order; other answers must equal the true one',
    **settings,
  )


TASKS = (
  _task('scenes_test', 'Scenes, held-out layouts'),
  _task('scenes_others', 'Scenes, further questions', kinds=OTHERS, scenes=50),
  _task(
    'scenes_combos',
    'Scenes, held-out combinations',
    split='combos',
    scenes=50,
  ),
  _task('easy_vqa_test', 'easy-VQA test', split='easy_vqa', scenes=50),
  _task('scenes_chat', 'Scenes, held-out layouts, in chats', chat=True),
  _task(
    'scenes_pairs',
    'Scenes, questions about two pictures',
    chat=True,
    pairs=True,
    scenes=100,
  ),
)
