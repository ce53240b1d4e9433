import io

import downloads
import pytest
from PIL import Image

from qwenvl_jax.data.mend import mend
from qwenvl_jax.data.records import (
  GroundedCaption,
  Qa,
  Record,
  Region,
  Span,
  Word,
)
from qwenvl_jax.errors import BadRecordError

_PICTURE = downloads.picture((100, 50))


def _regions(*boxes):
  regions = tuple(Region('it', (box,)) for box in boxes)
  made, notes = mend(Record('r', (_PICTURE,), regions=regions))
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
  made, _ = mend(record)
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
  made, notes = mend(record)
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
    mend(Record('r', (data,), captions=('x',)))
  assert error.value.reason == reason


def test_a_bomb_is_not_decoded():
  encoded = io.BytesIO()
  Image.new('1', (20_000, 10_000)).save(encoded, 'PNG')
  assert len(encoded.getvalue()) < 100_000
  with pytest.raises(BadRecordError) as error:
    mend(Record('r', (encoded.getvalue(),), captions=('x',)))
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
    record, found = mend(Record('r', (data,), captions=('x',)))
    assert set(found) == notes
  rotated, _ = mend(
    Record('r', (downloads.picture((20, 30), exif=exif),), captions=('x',))
  )
  assert rotated.size == (30, 20)


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
      mend(record)
    assert error.value.reason == 'empty_text'
