import random

import pytest

from qwenvl_jax.data import (
  formats,
  questions,
  sources,
  tasks,
  vocabulary,
)
from qwenvl_jax.data.examples import encode_sample
from qwenvl_jax.data.records import ScenePair
from qwenvl_jax.text.tokenizer import Tokenizer


def _same(whole, small, text):
  split = [
    [tokenizer.decode_bytes([token]) for token in tokenizer.encode(text, 4)]
    for tokenizer in (whole, small)
  ]
  return split[0] == split[1]


@pytest.fixture(scope='module')
def tokenizers(vocabulary):
  return Tokenizer(), Tokenizer(vocabulary)


def test_it_is_small_and_splits_its_texts_as_the_whole_does(tokenizers):
  whole, small = tokenizers
  assert small.vocab_size < 2000
  rng = random.Random(0)
  texts = sorted(set(vocabulary.texts(16)))
  for text in rng.sample(texts, 3000):
    assert _same(whole, small, text), text


def test_it_covers_scenes_as_they_are(tokenizers, small_scenes):
  scenes = small_scenes.open()
  for index in range(0, 400, 20):
    scene = scenes[index]
    pair, kinds = ScenePair(scene, scenes[index + 1]), questions.PAIR_KINDS
    asked = [
      *questions.enumerate_all(scene, 16),
      *questions.enumerate_all(scene, 16, chat=True),
      *questions.enumerate_all(pair, 16, chat=True, kinds=kinds),
    ]
    for question in asked:
      assert _same(*tokenizers, question.prompt), question
      assert _same(*tokenizers, question.answer), question


@pytest.mark.parametrize(
  'asked', [tasks.Questions(in_words=True), tasks.Chats(two=0.5, text=0.5)]
)
def test_it_covers_rows(tokenizers, small_scenes, asked):
  scenes = small_scenes.open()
  for index in range(100):
    rng = random.Random(index)
    for sample in asked(scenes[index], rng, lambda: scenes[0]):
      whole, small = (encode_sample(sample, x, 64) for x in tokenizers)
      assert len(whole) == len(small)
      assert tokenizers[0].decode(whole.tokens) == (
        tokenizers[1].decode(small.tokens)
      )


def test_any_other_text_still_encodes(tokenizers):
  text = 'Zürich, 龍 and 🙂: unseen words.'
  assert tokenizers[1].decode(tokenizers[1].encode(text)) == text


def test_it_covers_easy_vqa(tokenizers):
  for record in sources.EasyVqa('test', limit=50).open():
    for asked in record.questions:
      spans = formats.vqa('en', asked.question, asked.answer)
      assert _same(*tokenizers, ''.join(x.text for x in spans))
