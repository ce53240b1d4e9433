import random

import pytest

from qwenvl_jax.infer.request import Token
from qwenvl_jax.serve.writing import Writer
from qwenvl_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_ranks([bytes([i]) for i in range(256)])


def write(text, stops, seed):
  """What a writer gives out for a text that comes in pieces."""
  tokens = [Token(byte) for byte in text.encode()]
  writer, rng = Writer(TOKENIZER, stops), random.Random(seed)
  pieces, given = [], []
  while True:
    count = rng.randint(0, 3)
    now, tokens = tokens[:count], tokens[count:]
    piece = writer.add(now, last=not tokens)
    pieces.append(piece.text)
    given += piece.tokens
    if not tokens or writer.stopped:
      return pieces, given, writer


@pytest.mark.parametrize('seed', range(50))
def test_text_comes_whole_and_in_order(seed):
  rng = random.Random(seed)
  text = ''.join(rng.choices('ab狗🐕', k=rng.randint(0, 20)))
  pieces, given, writer = write(text, [], seed)
  assert ''.join(pieces) == text == writer.text
  assert '\ufffd' not in ''.join(pieces)
  assert [t.id for t in given] == list(text.encode())


@pytest.mark.parametrize('seed', range(100))
def test_nothing_of_a_stop_text_is_given_out(seed):
  rng = random.Random(seed)
  text = ''.join(rng.choices('ab狗', k=20))
  stops = [''.join(rng.choices('ab狗', k=rng.randint(1, 4))) for _ in range(2)]
  pieces, given, writer = write(text, stops, seed)
  ends = [text.find(stop) for stop in stops if stop in text]
  # Where two end at different tokens, the first one that is complete counts.
  done = [text.find(s) + len(s) for s in stops if s in text]
  if not ends:
    assert ''.join(pieces) == text and not writer.stopped
    return
  assert writer.stopped
  first = min(done)
  begin = min(
    text.find(s) for s in stops if s in text and text.find(s) + len(s) == first
  )
  assert ''.join(pieces) == text[:begin]
  assert len(given) == len(text[:first].encode())


def test_half_a_character_at_the_end():
  writer = Writer(TOKENIZER)
  assert writer.add([Token('狗'.encode()[0])], last=False).text == ''
  assert writer.add([], last=True).text == '\ufffd'
