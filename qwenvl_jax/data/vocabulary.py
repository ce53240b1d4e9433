"""The small vocabulary: the released one, reduced to what the data can say.

A small model's embedding table need not hold 151,643 rows of which it meets a
few hundred. The subset splits every text below exactly as the whole vocabulary
does, so that what is learned is Qwen's own segmentation.
"""

import itertools
from collections.abc import Iterator

from qwenvl_jax.data import (
  formats,
  questions,
  sources,
  things,
  wording,
)
from qwenvl_jax.data.examples import END, Question
from qwenvl_jax.data.records import Object, Scene, ScenePair, Word, scene
from qwenvl_jax.text import chatml
from qwenvl_jax.text.tokenizer import Tokenizer

# Kinds of questions that write two classes into one sentence.
_OF_TWO = ('caption', 'count', 'left_of', 'compare', 'translate')

_SIDE = 100
# Left to right, without overlap.
_PLACES = ((2, 10, 22, 30), (40, 30, 60, 50), (70, 60, 90, 80))


def texts(classes: int) -> Iterator[str]:
  """Everything that the templates can write, or its parts.

  Chinese runs without spaces are split as a whole, so each two classes that may
  meet in a sentence are met here.
  """
  yield from map(str, range(10))
  yield from ('(', ',', '),(', ')', ' ', END, 'Picture 1: ', 'Picture 2: ')
  yield from chatml.SCAFFOLD
  for language in things.LANGUAGES:
    for colour in things.COLOURS:
      yield colour.name(language) + '\n'
    # As chats answer, without a space before it.
    for words in (wording.YES, wording.TRUE, wording.SIDE):
      yield from words[language]
  for question in _questions(classes):
    yield question.prompt
    yield question.answer + END
  yield from _easy_vqa()


def build(tokenizer: Tokenizer, classes: int) -> Tokenizer:
  """The subset of `tokenizer` that splits all of `texts` alike."""
  return tokenizer.subset(dict.fromkeys(texts(classes)))


def scenes(classes: int) -> Iterator[Scene]:
  """Scenes that between them hold every name, count, pair, colour and word."""
  colours = itertools.cycle(range(len(things.COLOURS)))
  words = itertools.cycle(things.WORDS)
  for thing in range(classes):
    for count in (1, 2, 3):
      # Twice as many scenes as colours, and more than there are words.
      yield _scene([thing] * count, next(colours), next(words)[0])
  for word, _ in things.WORDS:
    yield _scene([0], next(colours), word)
  for colour in range(len(things.COLOURS)):
    yield _scene([0], colour)
  for first, second in itertools.permutations(range(classes), 2):
    third = next(x for x in range(classes) if x not in (first, second))
    for kinds in (
      [first, second],
      [first, first, second],
      [first, second, second],
      [third, first, second],
    ):
      yield _scene(kinds, next(colours))


def _questions(classes: int) -> Iterator[Question]:
  before = None
  for one in scenes(classes):
    alone = len(one.classes) == 1
    for chat in (False, True):
      kinds = questions.KINDS if alone else _OF_TWO
      yield from questions.enumerate_all(one, classes, chat, kinds)
    if before is not None and alone:
      both, kinds = ScenePair(before, one), questions.PAIR_KINDS
      yield from questions.enumerate_all(both, classes, True, kinds)
    before = one


def _scene(kinds, colour, word=None) -> Scene:
  objects = [Object(kind, box) for kind, box in zip(kinds, _PLACES)]
  words = [Word(word, ((5, 5), (40, 5), (40, 25), (5, 25)))] if word else []
  return scene('vocabulary', b'', _SIDE, objects, colour, words=words)


def _easy_vqa() -> Iterator[str]:
  asked = {
    (question.question, question.answer)
    for split in ('train', 'test')
    for record in sources.EasyVqa(split).open()
    for question in record.questions
  }
  for question, answer in sorted(asked):
    for span in formats.vqa('en', question, answer):
      yield span.text
