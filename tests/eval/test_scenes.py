"""How answers about scenes are scored."""

import dataclasses

import numpy as np
import pytest

from qwenvl_jax.data.examples import Question
from qwenvl_jax.eval import scenes
from qwenvl_jax.model.config import qwen_vl_7b
from qwenvl_jax.text.tokenizer import Tokenizer

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
  assert scenes.score(REFER, answer).correct == right


def test_every_box_of_several_must_be_found():
  several = dataclasses.replace(
    REFER, boxes=((0, 0, 100, 100), (500, 500, 600, 600))
  )
  both = '<box>(0,0),(100,100)</box><box>(500,500),(600,600)</box>'
  assert scenes.score(several, both).correct
  assert not scenes.score(several, '<box>(0,0),(100,100)</box>').correct
  assert scenes.row_name(several) == 'refer, several boxes'


def test_short_answers_must_be_equal():
  assert scenes.score(COUNT, '2').correct
  assert not scenes.score(COUNT, '2 cats').correct


def test_grounded_captions_need_words_and_boxes():
  question = dataclasses.replace(
    REFER,
    kind='grounded_caption',
    answer='<ref>a cat</ref><box>(100,100),(300,300)</box> on a red background',
  )
  wrong_word = question.answer.replace('cat', 'dog')
  assert scenes.score(question, question.answer).correct
  assert not scenes.score(question, wrong_word).correct


def test_ocr_needs_the_word_and_its_place():
  question = Question(
    task='ocr',
    kind='ocr',
    language='en',
    prompt='OCR with grounding:',
    answer='<ref>open</ref><quad>(0,0),(99,0),(99,50),(0,50)</quad>',
    record='r',
  )
  assert scenes.score(question, question.answer).correct
  assert not scenes.score(
    question, question.answer.replace('open', 'stop')
  ).correct
  elsewhere = (
    '<ref>open</ref><quad>(500,500),(599,500),(599,550),(500,550)</quad>'
  )
  assert not scenes.score(question, elsewhere).correct


def test_table_compares_with_blank_and_majority():
  seen = [
    scenes.score(COUNT, '2'),
    scenes.score(COUNT, '2'),
    scenes.score(dataclasses.replace(COUNT, answer=' 1'), '2'),
    scenes.score(dataclasses.replace(COUNT, language='zh'), '2'),
  ]
  blind = [scenes.score(x.question, '1') for x in seen]
  english, chinese = scenes.tabulate(seen, blind)
  assert (english.name, english.language, english.count) == ('count', 'en', 3)
  assert english.accuracy == pytest.approx(2 / 3)
  assert english.blank == pytest.approx(1 / 3)
  assert english.majority == pytest.approx(2 / 3)
  assert chinese.count == 1


def test_one_object_is_told_from_several():
  assert scenes.row_name(REFER) == 'refer, several objects'
  one = dataclasses.replace(REFER, objects=1)
  assert scenes.row_name(one) == 'refer, one object'


def test_questions_are_asked_with_the_picture_and_without(monkeypatch):
  tokenizer = Tokenizer()
  asked = [dataclasses.replace(COUNT, record=name) for name in ('r', 's')]
  pictures = {
    name: np.full((4, 4, 3), value, np.uint8)
    for name, value in (('r', 2), ('s', 3))
  }
  rows = []

  def sees_one_number(engine, prompts, images, **settings):
    rows.extend(prompts)
    return [tokenizer.encode(f' {x.flat[0]}') for x in images]

  monkeypatch.setattr(scenes, 'generate', sees_one_number)
  config = qwen_vl_7b(scan_layers=False)
  seen, blind = scenes.ask(config, None, tokenizer, asked, pictures)
  assert [x.answer for x in seen] == ['2', '3']
  assert [x.correct for x in seen] == [True, False]
  # Grey, whatever the picture was: asked once for both.
  assert [x.answer for x in blind] == ['128', '128']
  assert len(rows) == 3
  assert len(set(map(tuple, rows))) == 1
  assert [x.question for x in blind] == asked
