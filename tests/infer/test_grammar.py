"""Grammars: whatever is drawn under their masks has the form asked for."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer import matcher as matchers
from qwenvl_jax.infer.grammar import (
  MAX_CHOICES,
  MAX_REGEX_CHARS,
  MAX_SCHEMA_CHARS,
  GrammarCompiler,
)
from qwenvl_jax.infer.request import GenerationError
from qwenvl_jax.text import grounding
from qwenvl_jax.text.tokenizer import Tokenizer

VOCAB_SIZE = 151936  # rows of the release's embedding table

SCHEMA = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string', 'maxLength': 12},
    'age': {'type': 'integer', 'minimum': 0, 'maximum': 150},
    'kind': {'enum': ['cat', 'dog', '狗']},
    'seen': {'type': 'boolean'},
    'sizes': {
      'type': 'array',
      'items': {'type': 'number', 'minimum': -9, 'maximum': 9, 'multipleOf': 1},
      'minItems': 1,
      'maxItems': 3,
    },
    'next': {'anyOf': [{'type': 'null'}, {'$ref': '#/$defs/point'}]},
  },
  'required': ['name', 'age', 'kind', 'sizes', 'next'],
  'additionalProperties': False,
  '$defs': {
    'point': {
      'type': 'object',
      'properties': {'x': {'type': 'integer', 'maximum': 7, 'minimum': -7}},
      'required': ['x'],
      'additionalProperties': False,
    }
  },
}
ODD_CHOICES = [
  'yes',
  'yes, it is',
  'no "quotes"',
  'back\\slash',
  'two\nlines',
  '狗 😀',
  '<|im_end|>',
  '<box>(1,2),(3,4)</box>',
  '\x00\x7f',
  '%json {}',
]


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer()


@pytest.fixture(scope='module')
def compiler(tokenizer):
  return GrammarCompiler(tokenizer, VOCAB_SIZE)


@pytest.fixture(scope='module')
def small():
  """A compiler whose vocabulary can be tried id by id."""
  pieces = [bytes([byte]) for byte in range(256)]
  pieces += [b'12', b'(1', b'),(', b'ab', b'{"', b'": ', b'</', b'\xe7\x8b']
  tokenizer = Tokenizer.from_ranks(pieces)
  return GrammarCompiler(tokenizer, tokenizer.vocab_size + 40)


def ids_of(mask) -> np.ndarray:
  return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder='little'))


def accepts(matcher, ids) -> bool:
  """Whether the grammar allows these tokens and may then end."""
  matcher = matcher.copy()
  for token in ids:
    if not matcher.allows(token):
      return False
    matcher.accept(token)
  return matcher.may_end


def draw(matcher, tokenizer, rng, stop) -> list[int]:
  """Draws an answer under the masks and checks each of them."""
  ids, specials = [], set(tokenizer.special.values()) - {stop}
  for _ in range(500):
    allowed = ids_of(matcher.mask())
    assert allowed.max() < tokenizer.vocab_size
    assert (stop in allowed) == matcher.may_end
    # Single bytes are few: without them, no quotation mark would ever come.
    bytes_only = allowed[allowed < 256]
    if rng.random() < 0.5 and len(bytes_only):
      allowed = bytes_only
    token = int(rng.choice(allowed))
    if stop in allowed and rng.random() < 0.3:
      token = stop
    matcher.accept(token)
    if token == stop:
      assert matcher.finished
      return ids
    ids.append(token)
    assert not specials & {token} or token in (
      tokenizer.ref_start_id,
      tokenizer.ref_end_id,
      tokenizer.box_start_id,
      tokenizer.box_end_id,
    )
  raise AssertionError(f'no end: {tokenizer.decode(ids)!r}')


def answers(grammar, tokenizer, count, seed=0):
  """Answers drawn under a grammar, as (ids, text)."""
  rng = np.random.default_rng(seed)
  stop = tokenizer.im_end_id
  for _ in range(count):
    ids = draw(grammar.matcher([stop]), tokenizer, rng, stop)
    yield ids, tokenizer.decode(ids)


def is_text(ids, tokenizer) -> bool:
  return all(token < len(tokenizer.vocabulary) for token in ids)


def test_json_schema(compiler, tokenizer):
  grammar = compiler.json_schema(SCHEMA)
  names = set()
  for ids, text in answers(grammar, tokenizer, 12):
    assert is_text(ids, tokenizer)
    value = json.loads(text)
    assert set(SCHEMA['required']) <= set(value) <= set(SCHEMA['properties'])
    assert isinstance(value['name'], str) and len(value['name']) <= 12
    assert type(value['age']) is int and 0 <= value['age'] <= 150
    assert value['kind'] in ('cat', 'dog', '狗')
    assert value.get('seen') in (None, True, False)
    assert 1 <= len(value['sizes']) <= 3
    assert all(-9 <= size <= 9 for size in value['sizes'])
    assert value['next'] is None or -7 <= value['next']['x'] <= 7
    names.add(value['name'])
  assert len(names) > 5  # not one answer again and again
  assert compiler.json_schema(json.dumps(SCHEMA)) is grammar


def test_json_space_is_bounded(compiler, tokenizer):
  """A model at a loss for words could else write blanks without end."""
  matcher = compiler.json_schema({'type': 'object'}).matcher(())
  encode = tokenizer.encode_ordinary
  assert accepts(matcher, encode('{"a": [1, {"b":\n    null}],\n\n"c": "d"}'))
  assert not accepts(matcher, encode('\n{}'))
  assert not accepts(matcher, encode('{' + '\n \n ' * 20 + '}'))


@pytest.mark.parametrize(
  'pattern',
  [
    r'[A-Z]{2}\d{1,3}',
    r'([a-zé狗]{1,5} ){2}(cat|dog)s?',
    r'a/b"c\\d|.{3}',
    r'^[^a]{1,4}$',
  ],
)
def test_regex(compiler, tokenizer, pattern):
  grammar = compiler.regex(pattern)
  for ids, text in answers(grammar, tokenizer, 6):
    assert is_text(ids, tokenizer)
    assert re.fullmatch(pattern, text), text


def test_choice(compiler, tokenizer):
  grammar = compiler.choice(ODD_CHOICES)
  for ids, text in answers(grammar, tokenizer, 30):
    assert is_text(ids, tokenizer)
    assert text in ODD_CHOICES
  # One that begins as another does may end there or go on.
  matcher = grammar.matcher([tokenizer.im_end_id])
  for token in tokenizer.encode_ordinary('yes'):
    matcher.accept(token)
  assert matcher.may_end and not matcher.finished
  for option in ODD_CHOICES:
    encoded = tokenizer.encode_ordinary(option)
    assert accepts(grammar.matcher(()), encoded)


@pytest.mark.parametrize(
  ('settings', 'places', 'boxes'),
  [
    ({}, 1, 1),
    ({'max_boxes': 3}, 1, 3),
    ({'ref': True}, 1, 1),
    ({'ref': True, 'max_refs': 2, 'max_boxes': 2}, 2, 2),
    ({'ref': 'the "red" 狗'}, 1, 1),
  ],
)
def test_boxes(compiler, tokenizer, settings, places, boxes):
  grammar = compiler.boxes(**settings)
  ref = settings.get('ref')
  for ids, text in answers(grammar, tokenizer, 6):
    answer = grounding.parse(text)
    assert not answer.leftovers
    grounding.check_tags(text)
    assert 1 <= len(answer.places) <= places
    for place in answer.places:
      assert 1 <= len(place.boxes) <= boxes
      assert all(0 <= x <= 999 for box in place.boxes for x in box)
      assert place.ref == (ref if isinstance(ref, str) else place.ref)
      assert bool(place.ref) == bool(ref)
    # The tags are the model's own tokens, not their letters.
    assert ids.count(tokenizer.box_start_id) == text.count('<box>')
    assert tokenizer.encode(text).count(tokenizer.ref_start_id) == ids.count(
      tokenizer.ref_start_id
    )


def test_boxes_of_the_model(compiler, tokenizer):
  """What the release writes is among what its grammar allows."""
  one = compiler.boxes().matcher(())
  named = compiler.boxes(ref=True, max_boxes=2).matcher(())
  assert list(ids_of(one.mask())) == [tokenizer.box_start_id]
  assert list(ids_of(named.mask())) == [tokenizer.ref_start_id]
  box = '<box>(536,509),(588,602)</box>'
  assert accepts(one, tokenizer.encode(box))
  assert accepts(named, tokenizer.encode(f'<ref> Two apples</ref>{box}{box}'))
  assert accepts(named, tokenizer.encode(f'<ref>击掌</ref>{box}'))
  for wrong in ('(1000,1),(2,3)', '(01,1),(2,3)', '(1,1),(2)', '(1, 1),(2,3)'):
    assert not accepts(one, tokenizer.encode(f'<box>{wrong}</box>'))
  assert not accepts(one, tokenizer.encode_ordinary(box))
  assert not accepts(named, tokenizer.encode(f'<ref> </ref>{box}'))


@pytest.mark.parametrize('form', ['json_schema', 'regex', 'choice', 'boxes'])
def test_masks_are_what_is_accepted(small, form):
  """Id by id: the mask has exactly those that the matcher goes on with."""
  make, value = {
    'json_schema': (small.json_schema, {'type': ['string', 'integer']}),
    'regex': (small.regex, '(ab|[0-9])*狗?.'),
    'choice': (small.choice, ['ab12', 'a', '狗', '(1']),
    'boxes': (small.boxes, 2),
  }[form]
  tokenizer = small.tokenizer
  stops = [tokenizer.im_end_id, tokenizer.eod_id]
  grammar, rng = make(value), np.random.default_rng(1)
  for _ in range(3):
    matcher = grammar.matcher(stops)
    for _ in range(15):
      mask = set(ids_of(matcher.mask()))
      accepted = set()
      for token in range(small.vocab_size):
        trial = matcher.copy()
        try:
          trial.accept(token)
          accepted.add(token)
        except GenerationError:
          assert not matcher.allows(token)
          last = trial
      assert set(ids_of(last.mask())) == mask  # as before the refusal
      # Text that must follow comes in the tokenizer's own tokens.
      assert accepted == mask or (accepted > mask and len(mask) == 1)
      assert set(stops) & mask == (set(stops) if matcher.may_end else set())
      if matcher.finished:
        break
      matcher.accept(rng.choice(sorted(mask - set(stops))))


def test_any_stop_id(compiler, tokenizer):
  """Also text may end an answer, but not before the grammar does."""
  (comma,) = tokenizer.encode_ordinary(',')
  matcher = compiler.regex('[a-z,]{2,}').matcher([comma])
  assert comma not in ids_of(matcher.mask())
  for token in tokenizer.encode_ordinary('word'):
    matcher.accept(token)
  assert comma in ids_of(matcher.mask())
  matcher.accept(comma)
  assert matcher.finished
  assert list(ids_of(matcher.mask())) == [comma]
  with pytest.raises(GenerationError, match='does not allow token'):
    matcher.accept(tokenizer.encode_ordinary('a')[0])
  with pytest.raises(ConfigError, match='stop id 151936 is not'):
    compiler.boxes().matcher([VOCAB_SIZE])
  # Where the grammar needs what would end it, nothing is left.
  matcher = compiler.boxes().matcher([tokenizer.box_start_id])
  with pytest.raises(GenerationError, match='give other stop ids'):
    matcher.mask()


def test_finished_without_stop_ids(compiler, tokenizer):
  matcher = compiler.choice(['no', 'yes']).matcher(())
  assert not matcher.finished
  matcher.accept(tokenizer.encode_ordinary('yes')[0])
  assert matcher.finished and matcher.may_end
  assert not matcher.mask().any()


def test_fill_writes_one_row(compiler):
  masks = np.full((3, VOCAB_SIZE // 32), 0xFFFFFFFF, np.uint32)
  matcher = compiler.boxes().matcher(())
  matcher.fill(masks[1])
  assert (masks[[0, 2]] == 0xFFFFFFFF).all()
  assert np.array_equal(masks[1], matcher.mask())
  with pytest.raises(ValueError, match='a mask is'):
    matcher.fill(masks[1, :-1])


def test_copies_go_their_own_way(compiler, tokenizer):
  matcher = compiler.choice(['one', 'two']).matcher(())
  other = matcher.copy()
  other.accept(tokenizer.encode_ordinary('two')[0])
  assert other.finished and not matcher.finished
  assert matcher.allows(tokenizer.encode_ordinary('one')[0])


def test_an_answer_survives_states_that_others_used_up(
  compiler, tokenizer, monkeypatch
):
  monkeypatch.setitem(matchers.LIMITS, 'max_lexer_states', 4000)
  grammar = compiler.regex(r'(\w{1,500}\W{1,500}){1,99}')
  first = grammar.matcher(())
  first.accept(tokenizer.encode_ordinary('word')[0])
  expected = first.mask()
  rng = np.random.default_rng(0)
  greedy = grammar.matcher(())
  with pytest.raises(GenerationError, match='more work than is allowed'):
    for _ in range(300):
      greedy.accept(rng.choice(ids_of(greedy.mask())))
  assert np.array_equal(first.mask(), expected)
  again = grammar.matcher(())
  again.accept(tokenizer.encode_ordinary('word')[0])
  assert np.array_equal(again.mask(), expected)


def nested(depth) -> str:
  return '{"properties":{"a":' * depth + '{}' + '}}' * depth


@pytest.mark.parametrize(
  ('form', 'value', 'message'),
  [
    ('json_schema', '', 'is not JSON: Expecting value'),
    ('json_schema', '{"type":', 'is not JSON'),
    ('json_schema', True, 'must be an object'),
    ('json_schema', '[1]', 'must be an object'),
    ('json_schema', {'const': float('nan')}, 'is not JSON: Out of range'),
    ('json_schema', {'const': {1}}, 'is not JSON'),
    ('json_schema', {'const': '\ud800'}, 'cannot be used'),
    ('json_schema', nested(200), 'recursion limit'),
    # Which of the two parsers gives up first depends on Python's version.
    ('json_schema', nested(3000), 'nested too deep|recursion limit'),
    ('json_schema', '{"const":"%s"}' % ('a' * MAX_SCHEMA_CHARS), 'smaller'),
    ('json_schema', {'type': 'tuple'}, 'Invalid type: tuple'),
    ('json_schema', {'not': {}}, r'Unimplemented keys: \["not"\]'),
    ('json_schema', {'type': 'string', 'format': 'x'}, 'Unknown format: x'),
    ('json_schema', {'pattern': '(?=a)', 'type': 'string'}, 'look-around'),
    ('json_schema', {'$ref': '#'}, 'nothing satisfies it'),
    ('json_schema', {'$ref': 'http://a/b'}, 'does not fetch'),
    ('json_schema', {'oneOf': [{}, {'type': 'null'}]}, 'write anyOf'),
    ('json_schema', {'minimum': 2, 'maximum': 1, 'type': 'number'}, 'greater'),
    ('json_schema', {'x-guidance': {'lenient': True}}, 'take it out'),
    ('regex', '', 'not empty'),
    ('regex', None, 'not empty'),
    ('regex', 'a' * (MAX_REGEX_CHARS + 1), 'smaller'),
    ('regex', '(' * 1000 + ')' * 1000, 'nested parentheses'),
    ('regex', '(', 'unclosed group'),
    ('regex', r'(a)\1', 'backreferences are not supported'),
    ('regex', r'\bword', 'lookarounds not supported'),
    ('regex', r'[^\x00-\x{10FFFF}]', 'nothing satisfies it'),
    ('regex', 'a{0}', 'only an empty answer'),
    ('regex', '(?s)(.{0,500}[a-z]{3,}){20}', 'needs more work than is allowed'),
    ('regex', '\ud800', 'half of a character'),
    ('choice', [], 'empty list'),
    ('choice', 'yes', 'list of texts'),
    ('choice', ['yes', ''], 'choice 2 of 2'),
    ('choice', ['yes', 3], 'choice 2 of 2'),
    ('choice', ['a'] * (MAX_CHOICES + 1), 'smaller'),
    ('choice', ['a' * 300_000, 'b' * 300_000], 'characters in all'),
  ],
)
def test_refused(compiler, form, value, message):
  with pytest.raises(DataError, match=message) as caught:
    getattr(compiler, form)(value)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
  'settings',
  [{'max_boxes': 0}, {'max_boxes': 1.5}, {'max_boxes': 999}, {'max_refs': 2}],
)
def test_refused_box_settings(compiler, settings):
  with pytest.raises(ConfigError, match=next(iter(settings))):
    compiler.boxes(**settings)
  with pytest.raises(DataError, match='without < and >'):
    compiler.boxes(ref='</ref>')


def test_small_grammars_that_take_long(compiler, monkeypatch):
  """The compiler's process is ended; what does compile is bounded later."""
  monkeypatch.setattr('qwenvl_jax.infer.grammar._COMPILE_SECONDS', 1)
  multiples = [{'multipleOf': n} for n in (97, 101, 103, 107)]
  with pytest.raises(DataError, match='takes more than 1 s'):
    compiler.json_schema({'type': 'integer', 'allOf': multiples})
  for pattern in ('((a{1,100}){1,100}){1,100}', '(a?){1000}a{1000}'):
    compiler.regex(pattern)


def test_many_choices(compiler, tokenizer):
  options = [f'{number * number} things' for number in range(MAX_CHOICES)]
  for _, text in answers(compiler.choice(options), tokenizer, 3):
    assert text in options


def test_vocabulary_that_does_not_fit(tokenizer):
  with pytest.raises(ConfigError, match='vocab_size=32000'):
    GrammarCompiler(tokenizer, 32000)


def test_without_llguidance(tmp_path):
  """Everything else imports, and the error says what to install."""
  program = (
    'import sys; sys.modules["llguidance"] = None\n'
    'import qwenvl_jax.infer.scheduler\n'
    'from qwenvl_jax.infer.grammar import GrammarCompiler\n'
    'from qwenvl_jax.text.tokenizer import Tokenizer\n'
    'GrammarCompiler(Tokenizer.from_ranks([bytes([i]) for i in range(256)]))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  assert "pip install 'qwenvl_jax[serve]'" in done.stderr
