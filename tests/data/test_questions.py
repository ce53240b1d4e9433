import collections
import random

import pytest

from qwenvl_jax.data import questions, records, tasks, things
from qwenvl_jax.text import grounding


def _ask(scene, kind, language, subject, chat=False):
  question = questions.ask(kind, scene, language, subject, chat)
  return question.prompt, question.answer


@pytest.mark.parametrize(
  ('kind', 'language', 'subject', 'prompt', 'answer'),
  [
    (
      'caption', 'en', (), 'Generate the caption in English:',
      ' two apples and a cat on a red background',
    ),
    ('caption', 'zh', (), '用中文描述图片：', '两个苹果和一只猫，红色背景'),
    ('exist', 'en', 2, 'Is there a dog in the picture? Answer:', ' no'),
    ('exist', 'zh', 0, '图中有苹果吗？回答：', '有'),
    ('count', 'en', 0, 'How many apples are there? Answer:', ' 2'),
    ('count', 'zh', 1, '图中有几只猫？回答：', '1'),
    ('count', 'en', 'all', 'How many things are there? Answer:', ' 3'),
    ('count', 'zh', (0, 1), '苹果和猫一共有几个？回答：', '3'),
    ('colour', 'en', (), 'What color is the background? Answer:', ' red'),
    (
      'side', 'en', 1,
      'Is the cat on the left or the right? Answer:', ' right',
    ),
    ('side', 'zh', 1, '猫在左边还是右边？回答：', '右边'),
    (
      'refer', 'en', 1, '<ref>the cat</ref>',
      '<box>(536,89),(893,357)</box>',
    ),
    (
      'refer', 'zh', 0, '<ref>两个苹果</ref>',
      '<box>(45,446),(357,804)</box><box>(554,536),(929,893)</box>',
    ),
    (
      'name_box', 'en', 0,
      '<ref>This</ref><box>(45,446),(357,804)</box>', ' is an apple',
    ),
    (
      'grounded_caption', 'zh', (), '用中文描述图片并标出位置：',
      '<ref>两个苹果</ref><box>(45,446),(357,804)</box>'
      '<box>(554,536),(929,893)</box>和<ref>一只猫</ref>'
      '<box>(536,89),(893,357)</box>，红色背景',
    ),
    (
      'ocr', 'en', (), 'OCR with grounding:',
      ' <ref>open</ref><quad>(9,18),(179,27),(179,179),(9,179)</quad>',
    ),
    ('read', 'en', (), 'OCR:', 'open'),
    ('read', 'zh', (), '识别文字：', 'open'),
    ('translate', 'en', 0, 'Translate into Chinese: two apples\n', '两个苹果'),
  ],
)  # fmt: skip
def test_wording(two_apples_and_a_cat, kind, language, subject, prompt, answer):
  asked = _ask(two_apples_and_a_cat, kind, language, subject)
  assert asked == (prompt, answer)


def test_three_classes_and_vowels():
  scene = records.scene(
    'x',
    b'',
    112,
    [
      records.Object(0, (70, 0, 100, 30)),
      records.Object(17, (40, 0, 60, 30)),
      records.Object(5, (0, 0, 30, 30)),
    ],
    colour=3,
  )
  caption = questions.ask('caption', scene, 'en', ()).reference
  assert caption == 'an apple, a fish and an elephant on a blue background'
  caption = questions.ask('caption', scene, 'zh', ()).reference
  assert caption == '一个苹果、一条鱼和一头大象，蓝色背景'


def test_left_of_is_true_and_only_asked_about_two_single_things():
  far = records.scene(
    'far',
    b'',
    112,
    [records.Object(3, (70, 0, 100, 30)), records.Object(4, (0, 50, 30, 80))],
    colour=3,
  )
  assert questions.subjects('left_of', far, 16) == [(3, 4), (4, 3)]
  asked = _ask(far, 'left_of', 'en', (4, 3))
  assert asked == ('Is the house to the left of the car? Answer:', ' yes')
  asked = _ask(far, 'left_of', 'zh', (3, 4))
  assert asked == ('汽车在房子的左边吗？回答：', '不是')
  alone = records.scene('one', b'', 112, far.objects[:1], colour=3)
  assert not questions.subjects('left_of', alone, 16)
  assert not questions.held_out(alone, ['left_of'], classes=16)
  close = records.scene(
    'close',
    b'',
    112,
    [records.Object(3, (70, 0, 100, 30)), records.Object(4, (68, 50, 98, 80))],
    colour=3,
  )
  assert not questions.subjects('left_of', close, 16)


def test_repeated_things_are_not_asked_about_as_if_they_were_one(
  two_apples_and_a_cat,
):
  scene = two_apples_and_a_cat
  assert questions.subjects('left_of', scene, 16) == []
  assert questions.subjects('side', scene, 16) == [1]


def test_existence_is_balanced(two_apples_and_a_cat):
  rng = random.Random(0)
  answers = collections.Counter(
    questions.ask(
      'exist',
      two_apples_and_a_cat,
      'en',
      questions.draw('exist', two_apples_and_a_cat, 16, rng),
    ).reference
    for _ in range(1000)
  )
  assert 450 < answers['yes'] < 550 and answers['no'] == 1000 - answers['yes']


def test_answers_can_be_read_back(two_apples_and_a_cat):
  for chat in (False, True):
    for question in questions.enumerate_all(two_apples_and_a_cat, 16, chat):
      grounding.check_tags(question.prompt)
      grounding.check_tags(question.answer)
      boxes = [
        box
        for place in grounding.parse(question.answer).places
        for box in place.boxes
      ]
      assert tuple(boxes) == question.boxes, question
  chat = questions.ask('refer', two_apples_and_a_cat, 'en', 1, chat=True)
  assert chat.prompt == 'Find the cat.'
  assert chat.answer == '<ref>the cat</ref><box>(536,89),(893,357)</box>'


def test_sampling_is_deterministic_distinct_and_follows_weights(
  two_apples_and_a_cat,
):
  def sample(seed):
    return questions.sample(
      two_apples_and_a_cat,
      random.Random(seed),
      {'caption': 1, 'refer': 3, 'left_of': 5},
      6,
      classes=16,
    )

  assert sample(0) == sample(0) != sample(1)
  kinds = {question.kind for seed in range(20) for question in sample(seed)}
  assert kinds == {'caption', 'refer'}, 'the scene allows no left_of'
  for seed in range(20):
    prompts = [question.prompt for question in sample(seed)]
    assert len(prompts) == len(set(prompts))


def test_chinese_share(two_apples_and_a_cat):
  for chinese, language in ((0.0, 'en'), (1.0, 'zh')):
    asked = questions.sample(
      two_apples_and_a_cat,
      random.Random(0),
      {'count': 1, 'refer': 1},
      4,
      classes=16,
      chinese=chinese,
    )
    assert {question.language for question in asked} == {language}


def test_exam_asks_both_languages_about_the_same(two_apples_and_a_cat):
  kinds = ['caption', 'exist', 'count', 'refer', 'ocr']
  asked = questions.held_out(two_apples_and_a_cat, kinds, classes=16)
  assert [x.kind for x in asked] == [k for k in kinds for _ in range(2)]
  english, chinese = asked[6:8]
  assert english.boxes == chinese.boxes
  assert {x.language for x in asked} == set(things.LANGUAGES)
  again = questions.held_out(two_apples_and_a_cat, kinds, classes=16)
  assert again == asked
  alone = questions.held_out(two_apples_and_a_cat, ['refer'], classes=16)
  assert alone == asked[6:8], 'a question does not depend on the others'


def test_as_many_yes_as_no_however_many_are_asked(two_apples_and_a_cat):
  answers = collections.Counter(
    question.answer.strip() in ('yes', '有')
    for seed in range(200)
    for question in questions.sample(
      two_apples_and_a_cat, random.Random(seed), {'exist': 1}, 8, classes=16
    )
  )
  # Two classes of sixteen are there: left alone, 'no' would be two of three.
  assert 0.4 < answers[True] / answers.total() < 0.6


def test_a_share_of_the_answers_lacks_the_space(two_apples_and_a_cat):
  def answers(spaceless):
    made = tasks.Questions(
      kinds={'exist': 1}, chinese=0, branches=1, spaceless=spaceless
    )
    for seed in range(40):
      (sample,) = made(two_apples_and_a_cat, random.Random(seed), None)
      yield ''.join(x.text for x in sample.continuations[0]).split('Answer:')[1]

  def spaced(spaceless):
    return sum(answer.startswith(' ') for answer in answers(spaceless))

  assert spaced(0.0) == 40
  assert 0 < spaced(0.5) < 40
  assert spaced(1.0) == 0
