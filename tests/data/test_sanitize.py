import dataclasses
import io

import downloads
import pytest
from PIL import Image

from qwenvl_jax import image
from qwenvl_jax.data.records import (
  GroundedCaption,
  Qa,
  Record,
  Region,
  Span,
  Turn,
  Word,
)
from qwenvl_jax.data.sanitize import sanitize
from qwenvl_jax.errors import BadRecordError
from qwenvl_jax.text import grounding

_PICTURE = downloads.picture((100, 50))
_BOX = (1, 2, 3, 4)


def _regions(*boxes):
  regions = tuple(Region('it', (box,)) for box in boxes)
  made, notes = sanitize(Record('r', (_PICTURE,), regions=regions))
  assert made.size == (100, 50)
  return [x.boxes[0] for x in made.regions], notes


def test_boxes_are_sorted_and_clipped():
  nan = float('nan')
  boxes, notes = _regions(
    (10, 10, 20, 20), (20, 20, 10, 10), (-30, 5, 400, 45), (0, 0, 100.5, 50),
    (110, 10, 120, 20), (5, 5, 5, 9), (nan, 0, 1, 1), (0, 0, float('inf'), 1),
  )  # fmt: skip
  assert boxes == [
    (10, 10, 20, 20), (10, 10, 20, 20), (0, 5, 100, 45), (0, 0, 100, 50),
  ]  # fmt: skip
  assert notes == ['sorted_box', 'clipped_box'] + ['dropped_box'] * 4
  with pytest.raises(BadRecordError) as error:
    _regions((110, 10, 120, 20))
  assert error.value.reason == 'no_box'


def test_quads_and_spans():
  quad = ((1, 1), (120, 1), (120, 9), (1, 9))
  spans = (Span(0, 1, ((0, 0, 9, 9), (200, 0, 210, 9))), Span(0, 1, ()))
  record = Record(
    'r',
    (_PICTURE,),
    words=(Word('a', quad), Word('b', quad[:3]), Word('<box>', quad)),
    grounded=(GroundedCaption('x y', spans), GroundedCaption('<img>', spans)),
  )
  made, _ = sanitize(record)
  assert made.words == (Word('a', ((1, 1), (100, 1), (100, 9), (1, 9))),)
  (grounded,) = made.grounded
  assert grounded.spans == (Span(0, 1, ((0, 0, 9, 9),)),)


def test_strangers_write_no_special_tokens():
  record = Record(
    'r',
    (_PICTURE,),
    captions=('a <|endoftext|> b', '<<img>img>', 'x < y > z <b>'),
    questions=(Qa('<img>', 'x'), Qa('Q<ref>?', '</box>yes', ('<|im_end|>n',))),
  )
  made, notes = sanitize(record)
  assert made.captions == ('a  b', 'x < y > z <b>')
  assert made.questions == (Qa('Q?', 'yes', ('n',)),)
  assert set(notes) == {'special_tag'}


@pytest.mark.parametrize(
  ('data', 'reason'),
  [
    (b'', 'unreadable_image'),
    (_PICTURE[: len(_PICTURE) // 2], 'unreadable_image'),
    (downloads.picture((1, 1), 'PNG'), 'tiny_image'),
    (downloads.picture((4000, 7), 'PNG'), 'tiny_image'),
  ],
)
def test_pictures_that_cannot_be_used(data, reason):
  with pytest.raises(BadRecordError) as error:
    sanitize(Record('r', (data,), captions=('x',)))
  assert error.value.reason == reason


def test_a_bomb_is_not_decoded():
  encoded = io.BytesIO()
  Image.new('1', (20_000, 10_000)).save(encoded, 'PNG')
  assert len(encoded.getvalue()) < 100_000
  with pytest.raises(BadRecordError) as error:
    sanitize(Record('r', (encoded.getvalue(),), captions=('x',)))
  assert error.value.reason == 'too_many_pixels'


def test_what_is_turned_into_plain_rgb_is_counted():
  frames = [Image.new('RGB', (20, 20), x) for x in ('red', 'blue', 'lime')]
  gif = io.BytesIO()
  frames[0].save(gif, 'GIF', save_all=True, append_images=frames[1:])
  exif = Image.Exif()
  exif[0x0112] = 6
  for data, notes in (
    (gif.getvalue(), {'first_frame', 'converted'}),
    (downloads.picture((20, 30), exif=exif), {'rotated'}),
    (_saved(Image.new('CMYK', (20, 20)), 'JPEG'), {'converted'}),
    (_saved(Image.new('I;16', (20, 20)), 'PNG'), {'converted'}),
    (_saved(Image.new('RGBA', (20, 20)), 'PNG'), {'flattened'}),
    (_PICTURE, set()),
  ):
    record, found = sanitize(Record('r', (data,), captions=('x',)))
    assert set(found) == notes
  rotated, _ = sanitize(
    Record('r', (downloads.picture((20, 30), exif=exif),), captions=('x',))
  )
  assert rotated.size == (30, 20)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('said', ['stored', 'shown', 'nothing', 'half'])
def test_boxes_turn_with_the_picture(orientation, said):
  """A red corner of a black picture, found again where EXIF shows it."""
  stored = Image.new('RGB', (120, 60))
  stored.paste((255, 0, 0), (80, 10, 110, 30))
  exif = Image.Exif()
  exif[0x0112] = orientation
  encoded = io.BytesIO()
  stored.save(encoded, 'PNG', exif=exif)
  data = encoded.getvalue()
  shown = image.load(data)
  expected = shown.getchannel(0).getbbox()
  size = {
    'stored': stored.size, 'shown': shown.size, 'nothing': (0, 0),
    'half': (60, 30),
  }[said]  # fmt: skip
  box, unit = (80, 10, 110, 30), 0.5 if said == 'half' else 1
  if said == 'shown' and shown.size != stored.size:
    box = expected
  x1, y1, x2, y2 = box = tuple(x * unit for x in box)
  record = Record(
    'r',
    (data,),
    size,
    regions=(Region('red', (box,)),),
    grounded=(GroundedCaption('red', (Span(0, 3, (box,)),)),),
    words=(Word('red', ((x1, y1), (x2, y1), (x2, y2), (x1, y2))),),
  )
  made, _ = sanitize(record)
  expected = tuple(x * unit for x in expected)
  assert made.size == tuple(x * unit for x in shown.size)
  assert made.regions[0].boxes == (expected,)
  assert made.grounded[0].spans[0].boxes == (expected,)
  x1, y1, x2, y2 = expected
  quad = made.words[0].quad
  assert set(quad) == {(x1, y1), (x2, y1), (x2, y2), (x1, y2)}
  if said != 'shown' or shown.size == stored.size:
    # Corners keep their order: the first is the word's own upper left.
    assert quad[0] == tuple(
      x * unit for x in image.turn((80, 10), stored.size, orientation)
    )


def test_the_scene_of_the_field():
  """60 x 120 as shown, stored 120 x 60 with orientation 6."""
  exif = Image.Exif()
  exif[0x0112] = 6
  data = downloads.picture((120, 60), exif=exif)
  box = (20, 10, 60, 50)
  made, _ = sanitize(
    Record('r', (data,), (120, 60), regions=(Region('it', (box,)),))
  )
  assert grounding.from_pixels(made.regions[0].boxes[0], made.size) == (
    167, 167, 833, 500,
  )  # fmt: skip
  turns = (Turn('user', '<img>a</img> <box>(667,500),(917,833)</box>?'),)
  made, _ = sanitize(Record('r', (data,), (120, 60), turns=turns))
  assert made.turns[0].text == '<img>a</img> <box>(167,667),(500,917)</box>?'
  # In thousandths of a picture of unknown size: of what is shown.
  assert sanitize(Record('r', (data,), turns=turns))[0].turns == turns


@pytest.mark.parametrize('size', [(60, 100), (100, 100), (9, 8)])
def test_a_size_that_fits_neither_way(size):
  record = Record('r', (_PICTURE,), size, regions=(Region('it', (_BOX,)),))
  with pytest.raises(BadRecordError, match='100 x 50; give the size') as error:
    sanitize(record)
  assert error.value.reason == 'size_mismatch'
  # Of no account where nothing refers to it.
  made, _ = sanitize(Record('r', (_PICTURE,), size, captions=('x',)))
  assert made.size == (100, 50)
  # Made smaller by a downloader, rounded to whole pixels.
  record = dataclasses.replace(record, size=(333, 167))
  assert sanitize(record)[0].size == (333, 167)


def test_documents_go_on_without_pictures_that_cannot_be_read():
  record = Record(
    'r', (b'cut', _PICTURE, b''), texts=('a', 'b <img>', '', 'c'),
    notes=('missing_picture',),
  )  # fmt: skip
  made, notes = sanitize(record)
  assert made.images == (_PICTURE,) and made.texts == ('a b', 'c')
  assert made.notes == ()
  assert notes == ['missing_picture'] * 3 + ['special_tag']
  with pytest.raises(BadRecordError) as error:
    sanitize(dataclasses.replace(record, images=(b'', b'', b'')))
  assert error.value.reason == 'unreadable_image'


def test_texts_have_a_limit():
  long = 'x' * 200_001
  for record in (
    Record('r', text=long),
    Record('r', turns=(Turn('user', long), Turn('assistant', 'x'))),
    Record('r', (_PICTURE,), texts=('', long)),
  ):
    with pytest.raises(BadRecordError, match='r: .* 200,001 char') as error:
      sanitize(record)
    assert error.value.reason == 'too_long'
  made, notes = sanitize(Record('r', text='<box' * 30_000 + '>' * 30_000 + 'x'))
  assert made.text == 'x' and notes == ['special_tag']


def _saved(picture, kind):
  encoded = io.BytesIO()
  picture.save(encoded, kind)
  return encoded.getvalue()


def test_nothing_left_to_learn():
  for record in (
    Record('r', (_PICTURE,)),
    Record('r', text='<|endoftext|>'),
    Record('r', (_PICTURE,), captions=('<img>',)),
  ):
    with pytest.raises(BadRecordError) as error:
      sanitize(record)
    assert error.value.reason == 'empty_text'
