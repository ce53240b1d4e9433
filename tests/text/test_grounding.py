"""Answers are read however they end; training text is checked."""

import random

import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.text import grounding
from qwenvl_jax.text.grounding import Place

BEES = (
  'Beautiful shot of <ref>bees</ref><box>(661,612),(833,812)</box>'
  '<box>(120,555),(265,770)</box> gathering from <ref>a flower</ref>'
  '<box>(224,13),(399,313)</box><|endoftext|>'
)


def test_parse_gives_each_phrase_its_boxes():
  answer = grounding.parse(BEES)
  assert answer.places == (
    Place('bees', ((661, 612, 833, 812), (120, 555, 265, 770))),
    Place('a flower', ((224, 13, 399, 313),)),
  )
  assert answer.text == (
    'Beautiful shot of bees gathering from a flower<|endoftext|>'
  )
  assert answer.leftovers == ()
  assert ''.join(map(str, answer.places)) in (
    BEES.replace(' gathering from ', '').replace('Beautiful shot of ', '')
  )


def test_parse_reads_quads_and_bare_boxes():
  text = (
    '<img>p.png</img><ref>It is</ref> <quad>(1,2),(3,4),(5,6),(7,8)</quad> '
    'then <box>(9,8),(7,6)</box>'
  )
  assert grounding.parse(text).places == (
    Place('It is', (), ((1, 2, 3, 4, 5, 6, 7, 8),)),
    Place('', ((9, 8, 7, 6),)),
  )


@pytest.mark.parametrize(
  ('text', 'places', 'leftovers'),
  [
    ('<ref>dog</ref><box>(1,2),(3,4)', [Place('dog', ((1, 2, 3, 4),))], []),
    (
      '<box>(1,2),(3,4)<|im_end|>',
      [Place('', ((1, 2, 3, 4),))],
      [],
    ),
    ('<ref>dog</ref><box>(1,2),(3,', [Place('dog')], ['<box>(1,2),(3,']),
    ('<ref>dog</ref><box>', [Place('dog')], ['<box>']),
    ('<ref>dog<box>(1,2),(3,4)</box>', [Place('dog', ((1, 2, 3, 4),))], []),
    ('a <ref>do', [], ['<ref>do']),
    ('<box>(a,2),(3,4)</box>', [], ['<box>(a,2),(3,4)</box>']),
    (
      '<box>(1,2)</box><box>(5,6),(7,8)</box>',
      [Place('', ((5, 6, 7, 8),))],
      ['<box>(1,2)</box>'],
    ),
    ('</box></ref>hi', [], []),
    ('<img>never', [], ['<img>never']),
    ('', [], []),
    (f'<box>({"9" * 5000},2),(3,4)</box>', [], None),
  ],
)
def test_parse_reads_unfinished_answers(text, places, leftovers):
  answer = grounding.parse(text)
  assert list(answer.places) == places
  if leftovers is not None:
    assert list(answer.leftovers) == leftovers


def test_parse_never_fails():
  rng = random.Random(0)
  pieces = ['<ref>', '</ref>', '<box>', '</box>', '<quad>', '</quad>', '<img>']
  pieces += ['</img>', '(1,2)', ',', '(3,4)', 'dog', '<|im_end|>', ' ', '<']
  for _ in range(3000):
    text = ''.join(rng.choices(pieces, k=rng.randrange(12)))
    answer = grounding.parse(text)
    for tag in pieces[:8]:
      assert tag not in answer.text
    grounding.first_box(text)
    grounding.without_images(text)


def test_first_box_needs_no_tags():
  assert grounding.first_box('(0,474),(191,851)') == (0, 474, 191, 851)
  assert grounding.first_box('x<box>(1,2),(3,4)</box>') == (1, 2, 3, 4)
  assert grounding.first_box('(12,abc),(3,4)') is None


def test_pixels_and_back():
  size = (640, 427)
  box = grounding.from_pixels((0, 0, 640, 427), size)
  assert box == (0, 0, 999, 999)
  assert grounding.to_pixels(box, size, scale=999) == (0, 0, 640, 427)
  for pixels in ((12.5, 400, 630.2, 426), (1, 2, 3, 4)):
    back = grounding.to_pixels(grounding.from_pixels(pixels, size), size)
    assert back == pytest.approx(pixels, abs=0.33)


def test_without_images_keeps_the_words():
  text = 'a <img>x.png</img>b</img> c<imgpad> <img>d'
  assert grounding.without_images(text) == 'a b c '


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('see <ref>dog<box>(1,2),(3,4)</box>', 'row 3: <ref> at character 4 .*</r'),
    ('<box>(1,2),(3,4)', 'row 3: <box> at character 0 is not closed'),
    ('dog</ref>', 'row 3: </ref> at character 3 closes nothing'),
    ('<img>a.png<ref>x</ref>', '<img> at character 0 is not closed'),
    ('<ref>a</box>', '</box> at character 6 closes nothing'),
  ],
)
def test_check_tags_names_record_place_and_remedy(text, message):
  with pytest.raises(DataError, match=message):
    grounding.check_tags(text, 'row 3')


def test_check_tags_lets_prompts_end_in_an_open_box():
  prompt = '<img>a.png</img><ref>dog</ref><box>'
  grounding.check_tags(BEES)
  grounding.check_tags(prompt, unfinished=True)
  with pytest.raises(DataError):
    grounding.check_tags(prompt)
  with pytest.raises(DataError):
    grounding.check_tags('<img>a.png', unfinished=True)


def test_places_are_mapped_and_the_rest_stays():
  text = '<img>a(1,2)</img> <ref>(1,2)</ref><box>(1,2),(3,4)</box>(5,6)'

  def plus(points):
    return [x + 1 for x in points]

  assert grounding.map_places(text, plus, 'r') == text.replace(
    '<box>(1,2),(3,4)</box>', '<box>(2,3),(4,5)</box>'
  )
  quad = '<quad>(1,2),(3,4),(5,6),(999,1000)</quad>'
  assert grounding.map_places(quad, plus, 'r') == (
    '<quad>(2,3),(4,5),(6,7),(999,999)</quad>'
  )
  spaced = '<box> (1, 2),(3,4) </box>'
  assert grounding.map_places(spaced, lambda x: x, 'r') == spaced
  for wrong in ('(1,2)', '(1,2),(3,1001)', '(1.5,2),(3,4)', '[1,2,3,4]', ''):
    with pytest.raises(DataError, match='r: .*from 0 to 999'):
      grounding.map_places(f'<box>{wrong}</box>', plus, 'r')


@pytest.mark.parametrize(
  'text, words',
  [
    ('<ref>a dog</ref><box>(1,2),(3,4)</box> runs', 'a dog runs'),
    (
      '<ref>两只猫</ref><box>(1,2),(3,4)</box> <box>(5,6),(7,8)</box>。',
      '两只猫 。',
    ),
    # As `drawing.draw` numbers them: the first is the dog's.
    (
      '<ref>a dog</ref><box>(1,2),(3,4)</box> and <box>(1,2),(3,4)</box>',
      'a dog and [2]',
    ),
    ('<quad>(1,2),(3,4),(5,6),(7,8)</quad>', '[1]'),
    ('<box>(1,2),(3</box> a < b <3 <bo', '<box>(1,2),(3</box> a < b <3 <bo'),
    ('see <box>(1,2),(3', 'see <box>(1,2),(3'),
    ('a<img>made/up.png</img> b</box>', 'a b'),
    ('<box>' + 'x' * 999 + '</ref>', '<box>' + 'x' * 999),
  ],
)
def test_words_of_an_answer_wherever_it_is_cut(text, words):
  for size in (1, 2, 7, len(text)):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    # A piece may be empty: a token is not always a whole character.
    pieces = [part for piece in pieces for part in (piece, '')]
    assert ''.join(grounding.stream_words(pieces)) == words


def test_words_come_as_soon_as_they_are_known():
  given = []

  def pieces():
    for piece in ('a ', '<ref>', 'dog', '</ref><b', 'ox>', '(1,2),(3,4)'):
      given.append(piece)
      yield piece

  words = grounding.stream_words(pieces())
  assert [next(words), next(words)] == ['a ', 'dog']
  assert given == ['a ', '<ref>', 'dog']
