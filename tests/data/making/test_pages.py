import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwenvl_jax.data.making import backgrounds, pages, typefaces, words
from qwenvl_jax.data.making.page import upright
from qwenvl_jax.errors import DataError
from qwenvl_jax.text import fonts

SMALL = pages.Style(side=(320, 420), lines=8)


@pytest.fixture(scope='module')
def packaged():
  """The package's own font only: there is no machine without it."""
  path = str(fonts.PACKAGED_FONT)
  held = fonts.characters(path)
  return (typefaces.Typeface(path, held, ('en', 'zh')),)


def draw(packaged, seed, language, style=SMALL):
  return pages.draw(
    random.Random(seed), style, words.from_vocabulary(), packaged, language
  )


@pytest.mark.parametrize('language', ['en', 'zh'])
def test_a_page_is_a_function_of_its_seed(packaged, language):
  one, other = (draw(packaged, 5, language) for _ in range(2))
  assert one.lines == other.lines
  np.testing.assert_array_equal(one.picture, other.picture)
  assert draw(packaged, 6, language).lines != one.lines


def test_quads_lie_within_the_picture_and_clockwise(packaged):
  for seed in range(6):
    page = draw(packaged, seed, ('en', 'zh')[seed % 2])
    width, height = page.picture.size
    assert page.lines
    for line in page.lines:
      xs, ys = np.array(line.quad).T
      assert xs.min() >= 0 and xs.max() <= width
      assert ys.min() >= 0 and ys.max() <= height
      # Twice the area by the shoelace formula: positive if clockwise.
      area = np.sum(xs * np.roll(ys, -1) - ys * np.roll(xs, -1))
      assert area > 0
      assert line.word == ' '.join(line.word.split())


def test_quads_hold_all_ink_and_touch_it(packaged, monkeypatch):
  """On white without noise, what is dark is text, and the quads are tight."""
  monkeypatch.setattr(
    backgrounds, 'compose', lambda rng, size: Image.new('RGB', size, 'white')
  )
  monkeypatch.setattr(pages, '_photograph', lambda rng, style, picture: picture)
  style = pages.Style(side=(500, 600), lines=5, bare=1.0, columns=(1.0,))
  for seed in range(4):
    page = draw(packaged, seed, ('en', 'zh')[seed % 2], style)
    dark = np.asarray(page.picture.convert('L')) < 128
    covered = Image.new('L', page.picture.size)
    pen = ImageDraw.Draw(covered)
    for line in page.lines:
      pen.polygon(line.quad, fill=255, outline=255)
      alone = Image.new('L', page.picture.size)
      ImageDraw.Draw(alone).polygon(line.quad, fill=255)
      ys, xs = np.nonzero(dark & (np.asarray(alone) > 0))
      corners = np.array(line.quad)
      for values, axis in ((xs, 0), (ys, 1)):
        # Turned, an end of the text need not reach the quad's farthest corner.
        low, high = np.sort(corners[:, axis])[[1, 2]]
        assert values.min() <= low + 3 and values.max() >= high - 3
    # Pixels on the edge may stand out by a part of one.
    grown = np.asarray(covered) > 0
    grown = grown | np.roll(grown, 1, 0) | np.roll(grown, -1, 0)
    grown = grown | np.roll(grown, 1, 1) | np.roll(grown, -1, 1)
    assert dark.any() and not (dark & ~grown).any()


def test_homography_takes_corners_to_corners():
  source = upright(0, 0, 100, 50)
  target = ((10, 12), (90, 5), (97, 60), (3, 55))
  moved = pages.transform(pages.homography(source, target), source)
  np.testing.assert_allclose(moved, target, atol=1e-9)


def test_backgrounds_from_photographs(tmp_path):
  rng = random.Random(0)
  with pytest.raises(DataError, match='holds no picture'):
    backgrounds.photograph(rng, (50, 40), str(tmp_path))
  folder = tmp_path / 'some'
  folder.mkdir()
  Image.new('RGB', (30, 90), (200, 30, 30)).save(folder / 'red.png')
  found = backgrounds.photograph(rng, (50, 40), str(folder))
  assert found.size == (50, 40) and found.getpixel((9, 9)) == (200, 30, 30)


def test_composed_backgrounds_have_the_size_and_some_life():
  for seed in range(8):
    made = backgrounds.compose(random.Random(seed), (90, 60))
    assert made.size == (90, 60) and np.asarray(made).std() > 1


def test_every_font_found_writes_what_it_claims():
  faces = typefaces.find()
  assert any(x.path == str(fonts.PACKAGED_FONT) for x in faces)
  assert all(typefaces.of_language(faces, x) for x in ('en', 'zh'))
  for face in faces:
    assert not face.path.endswith(('cmsy10.ttf', 'cmex10.ttf'))
    if 'en' in face.languages:
      assert face.characters >= set(map(ord, 'Hello, world!'))


def test_words_leave_out_what_a_font_lacks():
  made = words.from_vocabulary().pieces(
    random.Random(0), 'en', set(map(ord, 'abcdefghijklmnopqrstuvwxyz.'))
  )
  text = ''.join(next(made) for _ in range(100))
  assert set(text) <= set('abcdefghijklmnopqrstuvwxyz. ') and len(text) > 200


def test_words_from_a_file(tmp_path):
  file = tmp_path / 'text.txt'
  file.write_text('The quick brown fox.\n<box>no</box>\n敏捷的狐狸。\n')
  found = words.from_file(str(file))
  assert found.sentences == {
    'en': ('The quick brown fox.',),
    'zh': ('敏捷的狐狸。',),
  }
  made = found.pieces(random.Random(0), 'en')
  assert ''.join(next(made) for _ in range(4)) == 'The quick brown fox. '
  file.write_text('<img>\n')
  with pytest.raises(DataError, match='no line of English or Chinese'):
    words.from_file(str(tmp_path / '..' / tmp_path.name / 'text.txt'))
