"""Labels are readable in both languages, and no answer breaks the drawing."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from qwenvl_jax.text import drawing, fonts
from qwenvl_jax.text.grounding import Place


def _glyphs(font, text: str) -> list[bytes]:
  return [bytes(font.getmask(c)) for c in text]


def test_packaged_font_shows_chinese():
  font, missing = fonts.find_font('红色的苹果 cat ①', 20, system=False)
  assert missing == ''
  glyphs = _glyphs(font, '红色的苹果')
  assert len(set(glyphs)) == 5 and all(any(g) for g in glyphs)
  assert fonts.PACKAGED_FONT.stat().st_size < 250_000
  listed = (fonts.PACKAGED_FONT.parent / 'characters.txt').read_text('utf-8')
  assert fonts.find_font(listed, 20, system=False)[1] == ''


def test_missing_characters_are_reported_once():
  font, missing = fonts.find_font('狗 🦄 and 🦄\u200d\ufe0f', 16, system=False)
  assert missing == '🦄'
  assert fonts.printable('狗\n🦄 \u200da', missing) == '狗 ? a'
  assert font.getbbox('狗')


def test_font_lookup_goes_from_system_to_package_to_pillow(
  tmp_path, monkeypatch
):
  broken = tmp_path / 'broken.ttc'
  broken.write_bytes(b'ttcf\0\1\2')
  paths = (str(tmp_path / 'absent.ttf'), str(broken))
  monkeypatch.setattr(fonts, 'SYSTEM_FONTS', paths)
  font, missing = fonts.find_font('猫', 16)
  assert missing == '' and font.getname()[0] == 'WenQuanYi Micro Hei'
  monkeypatch.setattr(fonts, 'PACKAGED_FONT', tmp_path / 'gone.ttf')
  font, missing = fonts.find_font('cat 猫', 16)
  assert missing == '猫'
  image, missing = drawing.draw(
    Image.new('RGB', (300, 300)), [Place('猫', ((1, 1, 900, 900),))]
  )
  assert missing == '猫'
  bitmap = ImageFont.load_default_imagefont()
  monkeypatch.setattr(fonts, '_pillow_font', lambda size: bitmap)
  _, missing = drawing.draw(image, [Place('猫 é', ((1, 1, 900, 900),))])
  assert missing == '猫'


def test_draw_puts_each_box_in_its_place_and_colour():
  image = Image.new('RGB', (1000, 500), (128, 128, 128))
  places = [
    Place('狗', ((100, 200, 400, 800), (500, 200, 600, 800))),
    Place('cat', ((700, 200, 900, 800),)),
  ]
  drawn, missing = drawing.draw(image, places)
  assert drawn.size == image.size and missing == ''
  assert image.getpixel((100, 250)) == (128, 128, 128)  # not drawn in place
  first, second = drawing.COLOURS[:2]
  assert drawn.getpixel((100, 250)) == first == drawn.getpixel((500, 250))
  assert drawn.getpixel((900, 250)) == second
  assert drawn.getpixel((250, 250)) == (128, 128, 128)


def test_labels_do_not_cover_each_other():
  image = Image.new('RGB', (600, 600), (128, 128, 128))
  places = [Place(name, ((300, 300, 700, 700),)) for name in 'abcdef']
  drawn, _ = drawing.draw(image, places)
  pixels = np.asarray(drawn)
  for colour in drawing.COLOURS[: len(places)]:
    assert np.all(pixels == colour, axis=-1).sum() > 150


def test_small_pictures_are_enlarged_within_bounds():
  box = [Place('x', ((0, 0, 999, 999),))]
  assert drawing.draw(Image.new('L', (112, 112)), box)[0].size == (448, 448)
  assert drawing.draw(Image.new('L', (20, 10)), box, min_side=0)[0].size == (
    20,
    10,
  )
  wide, _ = drawing.draw(Image.new('P', (3000, 1)), box)
  assert wide.size == (3000, 1)


@pytest.mark.parametrize(
  'answer',
  [
    '<ref>inverted</ref><box>(900,900),(100,100)</box>',
    '<ref>outside</ref><box>(5000,5000),(999999999,7)</box>',
    '<ref>point</ref><box>(5,5),(5,5)</box>',
    f'<ref>{"很长的名字" * 100}</ref><box>(1,1),(50,50)</box>',
    '<ref>\n\t</ref><box>(1,1),(50,50)</box>',
    '<ref>🦄\ud800</ref><box>(1,1),(50,50)</box>',
    '<ref>text</ref><quad>(1,1),(500,20),(480,90),(0,70)</quad>',
    '<box>(1,1),(50,50)</box>' * 60,
    '<ref>cut</ref><box>(1,',
    'no box',
  ],
)
@pytest.mark.parametrize('size', [(64, 64), (1, 1), (700, 30)])
def test_draw_takes_any_answer(answer, size):
  drawn, missing = drawing.draw(Image.new('RGBA', size), answer)
  assert drawn.mode == 'RGB'
  assert set(missing) <= {'🦄', '\ud800'}
