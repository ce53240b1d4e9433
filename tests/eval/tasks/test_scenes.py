"""How answers about scenes are scored."""

import dataclasses

import numpy as np
import pytest

from qwenvl_jax.data import prepare, questions
from qwenvl_jax.data.examples import Question
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.task import Item, Picture, units
from qwenvl_jax.eval.tasks import scenes

REFER = Question(
  task='referring',
  kind='refer',
  language='en',
  prompt='<ref>the cat</ref>',
  answer='<box>(100,100),(300,300)</box>',
  record='r',
  boxes=((100, 100, 300, 300),),
  objects=2,
)
COUNT = Question('vqa', 'count', 'en', 'How many?', ' 2', 'r', objects=2)


@pytest.mark.parametrize(
  ('answer', 'right'),
  [
    ('<box>(100,100),(300,300)</box>', True),
    ('<box>(100,100),(300,201)</box>', True),
    ('<box>(100,100),(300,199)</box>', False),
    ('<box>(100,100),(300', False),
    ('<box>(100,100),(300,300)</box><box>(0,0),(9,9)</box>', False),
    ('yes', False),
    ('', False),
  ],
)
def test_boxes_count_from_half_overlap(answer, right):
  assert scenes.judge(REFER, answer).correct == right


def test_every_box_of_several_must_be_found():
  several = dataclasses.replace(
    REFER, boxes=((0, 0, 100, 100), (500, 500, 600, 600))
  )
  both = '<box>(0,0),(100,100)</box><box>(500,500),(600,600)</box>'
  assert scenes.judge(several, both).correct
  assert not scenes.judge(several, '<box>(0,0),(100,100)</box>').correct
  assert scenes.row_name(several) == 'refer, several boxes'


def test_short_answers_must_be_equal():
  assert scenes.judge(COUNT, '2').correct
  assert not scenes.judge(COUNT, '2 cats').correct


def test_grounded_captions_need_words_and_boxes():
  question = dataclasses.replace(
    REFER,
    kind='grounded_caption',
    answer='<ref>a cat</ref><box>(100,100),(300,300)</box> on a red background',
  )
  wrong_word = question.answer.replace('cat', 'dog')
  assert scenes.judge(question, question.answer).correct
  assert not scenes.judge(question, wrong_word).correct


def test_ocr_needs_the_word_and_its_place():
  question = Question(
    task='ocr',
    kind='ocr',
    language='en',
    prompt='OCR with grounding:',
    answer='<ref>open</ref><quad>(0,0),(99,0),(99,50),(0,50)</quad>',
    record='r',
  )
  assert scenes.judge(question, question.answer).correct
  assert not scenes.judge(
    question, question.answer.replace('open', 'stop')
  ).correct
  elsewhere = (
    '<ref>open</ref><quad>(500,500),(599,500),(599,550),(500,550)</quad>'
  )
  assert not scenes.judge(question, elsewhere).correct


def items(task, questions, say):
  """Items of these questions, to which a model says what `say` returns."""
  examples = list(task.examples(questions))
  found = [Item(x, say(x)) for x in examples]
  scores = task.score_all(found, None)
  return [
    dataclasses.replace(item, scores=score)
    for item, score in zip(found, scores, strict=True)
  ]


@dataclasses.dataclass(frozen=True)
class Given(scenes.SceneTask):
  """Asks given questions, of pictures of their own."""

  def _questions(self, data_dir):
    for question in data_dir:
      yield [Picture(b'', question.record)], [question]


TASK = Given('given', 'Given', 'right')


def test_table_compares_with_blank_and_majority():
  asked = [
    COUNT,
    dataclasses.replace(COUNT, record='s'),
    dataclasses.replace(COUNT, record='t', answer=' 1'),
    dataclasses.replace(COUNT, record='u', language='zh'),
  ]
  found = items(TASK, asked, lambda x: '2' if x.meta else '1')
  english, chinese = scenes.tabulate(found)
  assert (english.name, english.language, english.count) == ('count', 'en', 3)
  assert english.accuracy == pytest.approx(2 / 3)
  assert english.blank == pytest.approx(1 / 3)
  assert english.majority == pytest.approx(2 / 3)
  assert chinese.count == 1
  aggregated = TASK.aggregate(units(TASK, found))
  assert aggregated == {'right': pytest.approx(3 / 4), 'blank': 1 / 4}


def test_one_object_is_told_from_several():
  assert scenes.row_name(REFER) == 'refer, several objects'
  one = dataclasses.replace(REFER, objects=1)
  assert scenes.row_name(one) == 'refer, one object'


def test_a_wording_is_asked_once_of_the_grey_picture():
  asked = [dataclasses.replace(COUNT, record=name) for name in ('r', 's')]
  asked.append(REFER)
  found = list(TASK.examples(asked))
  assert [bool(x.meta) for x in found] == [True, False, True, True, False]
  grey = np.asarray(found[1].prompt.pictures[0].open())
  assert (grey == 128).all()
  assert found[0].prompt.text == '<img>r</img>How many?'
  assert scenes.question_of(Item(found[3], '')) == REFER


def test_two_pictures_are_asked_about_in_one_chat(tmp_path):
  prepare.scenes(tmp_path, 'small')
  task = registry.get('scenes_pairs')
  task = dataclasses.replace(task, config='small', scenes=5)
  found = [x for x in task.examples(tmp_path) if x.meta]
  # The fifth scene has no partner.
  assert len({scenes.question_of(Item(x, '')).record for x in found}) == 2
  assert all(len(x.prompt.pictures) == 2 and x.prompt.chat for x in found)
  blank = next(x for x in task.examples(tmp_path) if not x.meta)
  assert len(blank.prompt.pictures) == 2
  rows = scenes.tabulate(items(task, tmp_path, lambda x: x.target or ''))
  assert {row.name for row in rows} == set(questions.PAIR_KINDS)
  assert all(row.accuracy == 1 and row.blank == 0 for row in rows)
