import random
import re

import pytest

from qwenvl_jax.text import special_tokens
from qwenvl_jax.text.tokenizer import Tokenizer


def _by_substitution(text):
  """The same, one round after the other."""
  pattern = re.compile('|'.join(map(re.escape, special_tokens.SPECIAL_TOKENS)))
  while pattern.search(text):
    text = pattern.sub('', text)
  return text


def test_removal_is_substitution_until_nothing_is_left():
  rng = random.Random(0)
  parts = [
    '<',
    '>',
    'img',
    'box',
    '/',
    '<img>',
    '<|im_end|>',
    '|',
    'x',
    '</ref>',
  ]
  for _ in range(3000):
    text = ''.join(rng.choices(parts, k=rng.randint(1, 14)))
    removed = special_tokens.remove(text)
    assert removed == _by_substitution(text), text
    assert not special_tokens.find(removed)


@pytest.mark.parametrize('repeated', ['<box', '<img>', '<|', '<', 'x<ref>'])
def test_removal_is_linear(repeated):
  # A quadratic one would take hours.
  text = repeated * 60_000 + '>' * 60_000
  text = 'y' * 200_000 + text + '<img>'
  assert not special_tokens.find(special_tokens.remove(text))


def test_they_are_those_of_the_vocabulary():
  tokenizer = Tokenizer()
  assert list(tokenizer.special) == list(special_tokens.SPECIAL_TOKENS)
  assert len(special_tokens.SPECIAL_TOKENS) == 217
  assert special_tokens.find('a <b> <|extra_204|> <img>') == '<|extra_204|>'
  assert special_tokens.find('<|extra_205|> < img>') == ''
  assert special_tokens.find_control('<img>a</img> <ref>') == ''
  assert special_tokens.find_control('<img>a</img> <|im_end|>') == '<|im_end|>'
  assert special_tokens.find_control('<imgpad>') == '<imgpad>'
