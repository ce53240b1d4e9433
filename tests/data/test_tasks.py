import random

import numpy as np
import pytest

from qwenvl_jax.data import questions, records, tasks
from qwenvl_jax.data.examples import encode_sample, plain
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text import chatml
from qwenvl_jax.text.chatml import TextSpan
from qwenvl_jax.text.tokenizer import Tokenizer

_TOKENIZER = Tokenizer()


def _turns(questions_, pictures):
  turns = []
  for number, question in enumerate(questions_):
    before = ''
    if not number:
      for i in range(pictures):
        before += f'Picture {i + 1}: <img>{i}</img>\n'
    turns.append({'from': 'user', 'value': before + question.prompt})
    turns.append({'from': 'assistant', 'value': question.answer})
  return turns


def _assert_same(sample, turns):
  """One conversation, as the release's fine-tuning encodes it."""
  encoded = encode_sample(plain(sample), _TOKENIZER, image_tokens=16)
  ids, labels = chatml.sft_example(_TOKENIZER, turns, image_tokens=16)
  assert encoded.tokens.tolist() == ids
  learned = [label != chatml.NO_LOSS for label in labels]
  assert (encoded.weights > 0).tolist() == learned
  assert list(encoded.image_starts) == _TOKENIZER.image_starts(ids, 16)


def test_conversations_are_what_fine_tuning_sees(two_apples_and_a_cat):
  scene = two_apples_and_a_cat
  asked = list(questions.enumerate_all(scene, 3, chat=True))
  span = [TextSpan('<img>0</img>')]
  for i in range(len(asked) - 1):
    turns = asked[i : i + 2]
    sample = tasks.chat('x', span, [turns], [b''])
    _assert_same(sample, _turns(turns, pictures=1))


def test_two_pictures_and_none(two_apples_and_a_cat):
  scene = two_apples_and_a_cat
  spans = [TextSpan('<img>0</img>'), TextSpan('<img>1</img>')]
  pair = records.ScenePair(scene, scene)
  for question in questions.enumerate_all(
    pair, 3, chat=True, kinds=questions.PAIR_KINDS
  ):
    sample = tasks.chat('x', spans, [[question]], [b'', b''])
    _assert_same(sample, _turns([question], pictures=2))
  talk = questions.ask('translate', scene, 'en', 0, chat=True)
  _assert_same(tasks.chat('x', [], [[talk]]), _turns([talk], pictures=0))


def test_pair_answers(two_apples_and_a_cat):
  first = two_apples_and_a_cat
  second = records.scene(
    'other', b'', 112, [records.Object(1, (0, 0, 30, 30))], colour=3
  )

  pair = records.ScenePair(first, second)

  def ask(kind, language, subject):
    question = questions.ask(kind, pair, language, subject, chat=True)
    return question.prompt, question.answer

  assert questions.subjects('which', pair, 3) == [(0,)]
  assert ask('which', 'en', (0,)) == ('Which picture has an apple?', '1')
  assert ask('nth_count', 'en', (2, 0)) == (
    'How many apples are in picture 2?',
    '0',
  )
  assert ask('nth_count', 'zh', (1, 0)) == ('第1张图里有几个苹果？', '2')
  assert ask('nth_colour', 'zh', (2,)) == ('第2张图的背景是什么颜色？', '蓝色')
  assert ask('nth_caption', 'en', (2,)) == (
    'Describe picture 2.',
    'a cat on a blue background',
  )


def test_rows_of_chats_have_one_or_two_pictures_or_words(two_apples_and_a_cat):
  scene = two_apples_and_a_cat
  seen = set()
  for seed in range(30):
    rng = random.Random(seed)
    sample, *talk = tasks.Chats(branches=3, text=0.5)(scene, rng, lambda: scene)
    encoded = encode_sample(sample, _TOKENIZER, 16)
    seen.add((len(encoded.image_starts), bool(talk)))
    # Conversations of one sample begin alike and differ from then on.
    starts = np.flatnonzero(np.diff(encoded.branch_ids)) + 1
    assert (encoded.weights[starts] == 0).all()
  assert seen == {(1, False), (1, True), (2, False), (2, True)}
  (sample,) = tasks.Chats(in_words=True, two=1, text=0)(
    scene, random.Random(0), lambda: scene
  )
  text = ''.join(piece.text for piece in sample.prefix)
  assert text.count('<box>') == 2 * len(scene.objects)
  assert 'Picture 2: <ref>' in text
  assert not sample.images


def test_kinds_about_two_pictures_come_as_often_as_is_said(
  two_apples_and_a_cat,
):
  scene = two_apples_and_a_cat
  captions = counts = 0
  for seed in range(100):
    chats = tasks.Chats(
      branches=1, turns=1, two=1, pairs={'nth_caption': 3, 'nth_count': 1}
    )
    (sample, *_) = chats(scene, random.Random(seed), lambda: scene)
    text = ''.join(piece.text for piece in sample.continuations[0])
    captions += 'Describe' in text or '描述' in text
    counts += 'How many' in text or '有几' in text
  assert captions + counts == 100 and 60 < captions < 90
  with pytest.raises(ConfigError, match=r"Chats\.pairs names 'caption'.*which"):
    tasks.Chats(pairs={'caption': 1})
  with pytest.raises(ConfigError, match=r'Chats\.pairs is empty'):
    tasks.Chats(pairs={})
