"""Held-out questions about composed scenes, and how answers are scored.

A question is asked of the model with the picture, and once more with a blank
one: what remains then was not read from pixels.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from qwenvl_jax import image
from qwenvl_jax.data import questions, tasks
from qwenvl_jax.data.examples import Question
from qwenvl_jax.data.records import Asked, Scene
from qwenvl_jax.eval.metrics import boxes as box_metrics
from qwenvl_jax.infer.generate import engine_for, generate
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.text import chatml, grounding
from qwenvl_jax.text.tokenizer import Tokenizer

KINDS = (
  'caption',
  'exist',
  'count',
  'colour',
  'left_of',
  'side',
  'name_box',
  'refer',
  'grounded_caption',
  'ocr',
)

# Of the pixels of a blank picture: nothing to see, and no colour's name.
_BLANK = 128

# Longest answer by kind, in tokens; boxes are long.
_NEW_TOKENS = {'refer': 64, 'grounded_caption': 112, 'ocr': 96, 'caption': 32}
_FEW_TOKENS = 12


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


def ask(
  config: QwenVLConfig,
  params: dict,
  tokenizer: Tokenizer,
  asked: Sequence[Question],
  pictures: dict[str, np.ndarray],
  *,
  chat: bool = False,
  batch_size: int = 128,
  cache_dtype: str | None = None,
) -> tuple[list[Answered], list[Answered]]:
  """Generates and scores the answers, greedily, with pictures and without.

  Args:
    config: of the model.
    params: its parameters.
    tokenizer: its vocabulary.
    asked: questions, each about the picture of its record.
    pictures: record id to [R,R,3] uint8.
    chat: ask in ChatML, as stage 3 learned it, rather than in plain prompts.
    batch_size: rows at once.
    cache_dtype: see `infer.engine.EngineConfig`.

  Returns:
    One `Answered` a question, in order: what it sees; and the same questions
    about a grey picture.
  """
  queries = config.adapter.queries
  stop = (
    (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id)
    if chat
    else (tokenizer.eod_id,)
  )
  waiting = collections.defaultdict(dict)
  keys = {False: [], True: []}
  for question in asked:
    ids = tuple(prompt(tokenizer, question, queries, chat))
    limit = _NEW_TOKENS.get(question.kind, _FEW_TOKENS)
    picture = pictures[question.record]
    # Grey pictures are all alike: each wording needs to be asked only once.
    seen, blind = (ids, question.record), (ids, None)
    keys[False].append(seen)
    keys[True].append(blind)
    waiting[limit] |= {seen: picture, blind: np.full_like(picture, _BLANK)}
  answers = {}
  for limit, group in waiting.items():
    prompts = [ids for ids, _ in group]
    outputs = generate(
      engine_for(
        *(config, params, prompts, limit, batch_size), cache_dtype=cache_dtype
      ),
      prompts,
      [picture[None] for picture in group.values()],
      max_new_tokens=limit,
      stop_ids=stop,
    )
    answers |= dict(zip(group, map(tokenizer.decode, outputs), strict=True))
  return tuple(
    [
      score(question, answers[key])
      for question, key in zip(asked, keys[blank], strict=True)
    ]
    for blank in (False, True)
  )


def prompt(
  tokenizer: Tokenizer, question: Question, queries: int, chat: bool
) -> list[int]:
  """Token ids up to where the answer begins."""
  if not chat:
    return tokenizer.encode(f'<img>0</img>{question.prompt}', queries)
  return chatml.chat_context(
    tokenizer,
    f'Picture 1: <img>0</img>\n{question.prompt}',
    image_tokens=queries,
  ).tokens


def score(question: Question, answer: str) -> Answered:
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


def exam(
  scenes: Iterable[Scene],
  size: int,
  *,
  classes: int = 16,
  kinds: Sequence[str] = KINDS,
  chat: bool = False,
) -> tuple[list[Question], dict[str, np.ndarray]]:
  """Questions on scenes in both languages, and the pictures they are about.

  Args:
    scenes: held-out ones.
    size: side of the pictures in pixels.
    classes: how many classes the data has.
    kinds: which questions; those a scene does not allow are left out.
    chat: worded for a chat.
  """
  asked, pictures = [], {}
  for scene in scenes:
    asked += questions.exam(scene, kinds, classes=classes, chat=chat)
    pictures[scene.id] = image.pixels(scene.image, size, scene.id)
  return asked, pictures


def exam_asked(
  found: Iterable[Asked], size: int
) -> tuple[list[Question], dict[str, np.ndarray]]:
  """As `exam`, with the questions that came with the pictures."""
  asked, pictures = [], {}
  for record in found:
    asked += [tasks.vqa(record, i) for i in range(len(record.questions))]
    pictures[record.id] = image.pixels(record.image, size, record.id)
  return asked, pictures


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


def tabulate(
  seen: Sequence[Answered], blind: Sequence[Answered]
) -> list[Score]:
  """Scores by kind and language; referring by number of objects, too.

  Args:
    seen: answers with pictures.
    blind: answers to the same questions with blank ones.
  """
  groups = collections.defaultdict(list)
  for with_picture, without in zip(seen, blind, strict=True):
    question = with_picture.question
    groups[row_name(question), question.language].append(
      (with_picture, without)
    )
  rows = []
  for (name, language), pairs in groups.items():
    references = collections.Counter(
      seen.question.reference for seen, _ in pairs
    )
    rows.append(
      Score(
        name=name,
        language=language,
        count=len(pairs),
        accuracy=float(np.mean([seen.correct for seen, _ in pairs])),
        blank=float(np.mean([blind.correct for _, blind in pairs])),
        majority=references.most_common(1)[0][1] / len(pairs),
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
