"""Text to write on pages, in English and Chinese.

By default, words of the released vocabulary in random order: nothing can be
guessed from what stands before, so that only reading helps. A file of running
text (an encyclopedia's, say) gives sentences instead.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import random
import re
from collections.abc import Collection, Iterator

from qwenvl_jax import buckets
from qwenvl_jax.data.languages import is_chinese
from qwenvl_jax.data.making.page import readable
from qwenvl_jax.data.readers import fields
from qwenvl_jax.errors import BadRecordError, DataError
from qwenvl_jax.text.tokenizer import Tokenizer

LANGUAGES = ('en', 'zh')

_ENGLISH = re.compile(' [A-Za-z]{3,14}')
_SHORT_WORDS = 'a an as at be by do he if in is it of on or so to up we'
_SHORT = tuple(_SHORT_WORDS.split())
_CHINESE = re.compile('[\u4e00-\u9fff]{1,4}')
# The vocabulary's frequent words are words; its rare ones often are not.
_FREQUENT = {'en': 6000, 'zh': 6000}
# Of a file, so many are read.
_MOST_LINES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Words:
  """Where text comes from.

  Attributes:
    words: language -> words, frequent ones first.
    sentences: language -> sentences; if there are any, they are taken.
  """

  words: dict[str, tuple[str, ...]]
  sentences: dict[str, tuple[str, ...]]

  def pieces(
    self, rng: random.Random, language: str, held: Collection[int] | None = None
  ) -> Iterator[str]:
    """Endless text in pieces that a line may end after.

    An English piece ends with a space. Pieces joined are running text. What has
    other code points than a font (`held`) is left out.
    """
    refused = 0
    while True:
      sentence = self._sentence(rng, language)
      shown = [x for x in sentence if _is_held(x, held)]
      # A sentence with gaps is none; but some fonts lack much.
      if len(shown) < len(sentence) and refused < 20:
        refused += 1
        continue
      refused = 0
      yield from shown

  def _sentence(self, rng, language):
    if self.sentences.get(language):
      sentence = rng.choice(self.sentences[language])
      if language == 'en':
        return [f'{word} ' for word in sentence.split(' ')]
      return re.findall('[A-Za-z0-9]+|.', sentence)
    if language == 'en':
      return _english(rng, self.words['en'])
    return _chinese(rng, self.words['zh'])


def _is_held(piece, held):
  return held is None or all(ord(c) in held or c == ' ' for c in piece)


def _pick(rng, words):
  """Frequent words more often: evenly over the logarithm of the rank."""
  return words[int(len(words) ** rng.random() * rng.uniform(0.5, 1))]


def _english(rng, words):
  sentence = []
  for number in range(rng.randint(4, 14)):
    word = _pick(rng, words).lower()
    chance = rng.random()
    if chance < 0.04:
      word = _figure(rng)
    elif chance < 0.09 or number == 0:
      word = word.capitalize()
    elif chance < 0.11:
      word = word.upper()
    elif chance < 0.13:
      word = rng.choice(('({})', '"{}"', "{}'s")).format(word)
    sentence.append(word)
    if rng.random() < 0.08:
      sentence[-1] += rng.choice(',,,;:')
  sentence[-1] = sentence[-1].rstrip(',;:') + rng.choice('.....?!')
  return [f'{word} ' for word in sentence]


def _chinese(rng, words):
  sentence = []
  for _ in range(rng.randint(1, 4)):
    for _ in range(rng.randint(2, 7)):
      word = _pick(rng, words)
      if rng.random() < 0.04:
        word = _figure(rng)
      # A line may end after any character, not within a number.
      sentence += [word] if word[0].isascii() else list(word)
    # No line may begin with a stop.
    sentence[-1] += rng.choice('，，，、；')
  sentence[-1] = sentence[-1][:-1] + rng.choice('。。。。！？')
  return sentence


def _figure(rng):
  number = int(10 ** rng.uniform(0, 5))
  return rng.choice(
    (
      str(number),
      f'{number:,}',
      f'{number / 100:.2f}',
      f'{rng.randint(1, 100)}%',
      f'{rng.randint(1950, 2026)}-{rng.randint(1, 12):02}',
      f'{rng.randint(0, 23)}:{rng.randint(0, 59):02}',
    )
  )


@functools.lru_cache(maxsize=1)
def from_vocabulary() -> Words:
  """Words of the released vocabulary."""
  found = {'en': list(_SHORT), 'zh': []}
  seen = set(_SHORT)
  for token in Tokenizer().vocabulary:
    try:
      text = token.decode('utf-8')
    except UnicodeDecodeError:
      continue
    language = None
    if _ENGLISH.fullmatch(text):
      language, text = 'en', text.strip().lower()
    elif _CHINESE.fullmatch(text):
      language = 'zh'
    if (
      language
      and text not in seen
      and (len(found[language]) < _FREQUENT[language])
    ):
      seen.add(text)
      found[language].append(text)
  return Words({k: tuple(v) for k, v in found.items()}, {})


@functools.lru_cache(maxsize=4)
def from_file(path: str | os.PathLike) -> Words:
  """Sentences of a UTF-8 text file, one or more a line.

  Raises:
    DataError: it cannot be read or holds neither language.
  """
  sentences = {'en': [], 'zh': []}
  try:
    with buckets.open_regular(pathlib.Path(path)) as file:
      for name, line in itertools.islice(fields.lines(file, path), _MOST_LINES):
        if isinstance(line, BadRecordError):  # Too long for a sentence.
          continue
        text = readable(fields.decode(line, name))
        if is_chinese(text):
          sentences['zh'].append(text)
        elif text.isascii() and ' ' in text:
          sentences['en'].append(text)
  except (OSError, BadRecordError) as error:
    raise DataError(f'{path} is no readable UTF-8 text: {error}') from error
  if not any(sentences.values()):
    raise DataError(
      f'{path} holds no line of English or Chinese text; give one sentence a '
      'line'
    )
  rest = from_vocabulary()
  return Words(rest.words, {k: tuple(v) for k, v in sentences.items()})
