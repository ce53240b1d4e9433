"""Questions and answers about pictures, as many data sets publish them."""

import collections
import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from qwenvl_jax.data.readers import fields
from qwenvl_jax.data.records import Qa, Record
from qwenvl_jax.errors import BadRecordError

_CONFIDENCE = {'yes': 1.0, 'maybe': 0.5, 'no': 0.0}


def best_answer(answers: Sequence[str], confidences: Sequence[str] = ()) -> str:
  """The answer that people were surest of.

  Each person's confidence counts 1 (yes), 1/2 (maybe) or 0 (no), summed by
  answer; among equals the one given more often, then the one given first.

  >>> best_answer(['cat', 'dog', 'dog'], ['yes', 'maybe', 'no'])
  'cat'
  """
  sure, often = collections.Counter(), collections.Counter()
  for answer, confidence in itertools.zip_longest(
    answers, confidences[: len(answers)], fillvalue='yes'
  ):
    sure[answer] += _CONFIDENCE.get(confidence, 0.0)
    often[answer] += 1
  return max(often, key=lambda answer: (sure[answer], often[answer]))


def qa(question: str, answers: Any, record: str, id_: str = '') -> Qa:
  """A question with one answer, a list, or a list with confidences.

  Empty ones of several answers are left out.

  Raises:
    BadRecordError: no answer, or one that is not text.
  """
  answers = answers if isinstance(answers, list) else [answers]
  given, sure = [], []
  for answer in answers:
    key = 'answer' if isinstance(answer, dict) else ''
    try:
      given.append(fields.text_field(answer, key, f'{record}, answer'))
    except BadRecordError as error:
      if error.reason != 'empty_text' or len(answers) == 1:
        raise
      continue
    sure.append(answer.get('answer_confidence', 'yes') if key else 'yes')
  if not given:
    raise BadRecordError('empty_text', f'{record}: no answer')
  return Qa(
    question=question,
    answer=best_answer(given, sure),
    answers=tuple(given) if len(given) > 1 else (),
    id=id_,
  )


class _Asked(fields.Annotated):
  """What readers of questions share: entries hold (image, Qa) pairs."""

  def pairs(self, root: pathlib.Path) -> Iterator:
    """(image, Qa) pairs, and errors."""
    return super().records(root)

  def records(self, root: pathlib.Path) -> fields.Found:
    """One record an image, with all its questions."""
    asked = []
    for pair in self.pairs(root):
      if isinstance(pair, BadRecordError):
        yield pair
      else:
        asked.append(pair)
    for image, questions in fields.by_image(asked).items():
      yield Record(image, (image,), questions=tuple(questions))


@dataclasses.dataclass(frozen=True)
class QaTable(_Asked):
  """Data sets that are a list of questions, each naming its image.

  GQA, DVQA, DocVQA, TextVQA, ChartQA and VizWiz differ in names only.

  Attributes:
    image: path of an image below `folder`; `{}` is what the entry holds.
    image_key, question_key, answer_key, id_key: names of the fields.
  """

  file: str
  image: str = '{}'
  folder: str = ''
  at: str = ''
  image_key: str = 'image'
  question_key: str = 'question'
  answer_key: str = 'answer'
  id_key: str = 'question_id'

  def _entry(self, key: str, entry: Any, record: str):
    id_ = str(entry.get(self.id_key, key))
    record = f'{self.file}, question {id_}'
    image = fields.text_field(entry, self.image_key, record)
    question = fields.text_field(entry, self.question_key, record)
    answers = fields.field(entry, self.answer_key, record)
    yield self.image.format(image), qa(question, answers, record, id_)


@dataclasses.dataclass(frozen=True)
class VqaPair(_Asked):
  """VQAv2 and OK-VQA: questions in one file, answers in another.

  Attributes:
    questions: the file with the questions.
    annotations: the file with the answers.
    image: path of an image below `folder`, from its number.
    folder: where the images are.
  """

  questions: str
  annotations: str
  image: str
  folder: str = ''

  @property
  def files(self) -> tuple[str, ...]:
    return tuple(
      x for x in (self.questions, self.annotations, self.folder) if x
    )

  def pairs(self, root: pathlib.Path):
    questions, annotations = (
      fields.entries(fields.field(fields.load_json(root, file), key, file))
      for file, key in (
        (self.questions, 'questions'),
        (self.annotations, 'annotations'),
      )
    )
    # What has no id, or none that can be one, leaves its question unanswered.
    answers = {
      entry['question_id']: entry.get('answers')
      for _, entry in annotations
      if isinstance(entry, dict)
      and isinstance(entry.get('question_id'), (int, str))
    }
    for key, entry in questions:
      yield from fields.attempt(
        self._pair, entry, answers, record=f'{self.questions}, number {key}'
      )

  def _pair(self, entry: Any, answers: dict) -> tuple[str, Qa]:
    id_ = entry.get('question_id')
    record = f'{self.questions}, question {id_}'
    image = self.image.format(int(fields.field(entry, 'image_id', record)))
    question = fields.text_field(entry, 'question', record)
    if answers.get(id_) is None:
      raise BadRecordError('empty_text', f'{record}: no answers')
    return image, qa(question, answers[id_], record, str(id_))


@dataclasses.dataclass(frozen=True)
class OcrVqa(_Asked):
  """OCR-VQA: book covers by id, with lists of questions and answers.

  Attributes:
    split: 1 train, 2 validation, 3 test.
  """

  split: int
  file: str = 'dataset.json'
  folder: str = 'images'

  def _entry(self, key: str, entry: Any, record: str):
    if fields.field(entry, 'split', record) != self.split:
      return
    # Its own script stores each cover by key, with the URL's ending.
    ending = pathlib.PurePosixPath(entry.get('imageURL', '')).suffix
    both = zip(
      fields.field(entry, 'questions', record),
      fields.field(entry, 'answers', record),
    )
    for number, (question, answer) in enumerate(both):
      question = fields.text_field(question, '', record)
      yield (
        f'{key}{ending or ".jpg"}',
        qa(question, answer, record, f'{key}/{number}'),
      )


@dataclasses.dataclass(frozen=True)
class VisualGenomeQa(_Asked):
  """VGQA: Visual Genome's `question_answers.json`.

  Attributes:
    folder: where `VG_100K` and `VG_100K_2` were put together.
  """

  file: str = 'question_answers.json'
  folder: str = 'images'

  def _entry(self, key: str, entry: Any, record: str):
    for asked in entry.get('qas', ()):
      yield from fields.attempt(self._pair, asked, record=record)

  def _pair(self, asked: Any) -> tuple[str, Qa]:
    id_ = str(asked.get('qa_id', ''))
    record = f'{self.file}, question {id_}'
    question = fields.text_field(asked, 'question', record)
    answer = fields.field(asked, 'answer', record)
    image = fields.field(asked, 'image_id', record)
    return f'{image}.jpg', qa(question, answer, record, id_)


@dataclasses.dataclass(frozen=True)
class Ai2d(_Asked):
  """AI2D: a file of questions for each diagram, with four options.

  Attributes:
    test: whether the diagrams listed in `test_ids`, or the others.
  """

  test: bool
  questions: str = 'questions'
  folder: str = 'images'
  test_ids: str = 'ai2d_test_ids.csv'

  @property
  def files(self) -> tuple[str, ...]:
    return self.questions, self.folder, self.test_ids

  def pairs(self, root: pathlib.Path):
    with open(root / self.test_ids, newline='', encoding='utf-8-sig') as file:
      held_out = {row[0].strip() for row in csv.reader(file) if row}
    for file in sorted((root / self.questions).glob('*.json')):
      found = fields.load_json(root, f'{self.questions}/{file.name}')
      yield from fields.guarded(
        self._of_file(found, file.stem, held_out), file.name
      )

  def _of_file(self, found: Any, stem: str, held_out: set[str]):
    image = str(found.get('imageName', stem))
    if (image.partition('.')[0] in held_out) != self.test:
      return
    for question, entry in found.get('questions', {}).items():
      record = f'{image}, {question[:40]!r}'
      yield from fields.attempt(
        self._pair, image, question, entry, record, record=record
      )

  def _pair(self, image, question, entry, record) -> tuple[str, Qa]:
    id_ = str(entry.get('questionId', ''))
    return image, _choice(
      question, entry, 'answerTexts', 'correctAnswer', record, id_
    )


@dataclasses.dataclass(frozen=True)
class ScienceQa(_Asked):
  """ScienceQA: `problems.json`; the questions that have a picture."""

  split: str
  file: str = 'problems.json'
  folder: str = ''

  @property
  def files(self) -> tuple[str, ...]:
    return self.file, self.split

  def _entry(self, key: str, entry: Any, record: str):
    if entry.get('split') != self.split or not entry.get('image'):
      return
    question = fields.text_field(entry, 'question', record)
    made = _choice(question, entry, 'choices', 'answer', record, key)
    hint = str(entry.get('hint') or '')
    image = f'{self.split}/{key}/{entry["image"]}'
    yield image, dataclasses.replace(made, context=hint)


def _choice(question, entry, options_key, answer_key, record, id_) -> Qa:
  options = fields.field(entry, options_key, record)
  options = tuple(fields.text_field(x, '', record) for x in options)
  answer = fields.field(entry, answer_key, record)
  if not isinstance(answer, int) or not 0 <= answer < len(options):
    raise BadRecordError(
      'malformed', f'{record}: {answer!r} is none of {len(options)} options'
    )
  return Qa(question, options[answer], options=options, id=id_)
