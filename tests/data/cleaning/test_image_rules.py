import io

import corpus
import pytest
from PIL import Image

from qwenvl_jax.data.cleaning import image_rules
from qwenvl_jax.data.cleaning.pair import UNREADABLE, Drop, Picture, clean
from qwenvl_jax.errors import ConfigError


def drops(rule, size) -> bool:
  return isinstance(rule(corpus.pair(picture=corpus.jpeg(0, size))), Drop)


def test_size_and_aspect_ratio_have_inclusive_limits():
  assert not drops(image_rules.Size(minimum=100), (100, 300))
  assert drops(image_rules.Size(minimum=100), (300, 99))
  assert not drops(image_rules.AspectRatio(maximum=3.0), (100, 300))
  assert drops(image_rules.AspectRatio(maximum=3.0), (301, 100))


def test_clip_score_by_source():
  rule = image_rules.ClipScore(minimum={'web': 0.3})
  assert isinstance(rule(corpus.pair(score=0.29)), Drop)
  assert isinstance(rule(corpus.pair(score=float('nan'))), Drop)
  assert not isinstance(rule(corpus.pair(score=0.3)), Drop)
  assert not isinstance(rule(corpus.pair(score=0.0, source='sbu')), Drop)
  assert not isinstance(rule(corpus.pair()), Drop)
  strict = image_rules.ClipScore(minimum={'web': 0.3}, missing='drop')
  assert isinstance(strict(corpus.pair()), Drop)
  with pytest.raises(ConfigError, match="'maybe'"):
    image_rules.ClipScore(missing='maybe')


@pytest.mark.parametrize(
  'data',
  [b'', b'<html>404</html>', corpus.jpeg(1)[:-500], corpus.jpeg(1)[:200]],
)
def test_what_does_not_decode_is_dropped(data):
  rules = (image_rules.Size(minimum=1), image_rules.Readable())
  outcome = clean(corpus.pair(picture=data), rules)
  assert outcome.reason == UNREADABLE and outcome.detail


def test_a_bomb_is_dropped_by_its_header():
  bomb = io.BytesIO()
  Image.new('1', (12_000, 12_000)).save(bomb, 'PNG')
  rules = (image_rules.Size(), image_rules.Readable())
  assert clean(corpus.pair(picture=bomb.getvalue()), rules).reason == UNREADABLE


def test_sizes_come_without_decoding():
  picture = Picture(corpus.jpeg(1)[:-500])
  assert picture.size == (160, 120)
