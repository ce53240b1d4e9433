import io
import random
import time

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.data import sources, things
from qwenvl_jax.data.builders import compose, scenes
from qwenvl_jax.text import fonts

_PLAIN = compose.Style(text=0)


def _drawings(count, style=_PLAIN, combos=False):
  return [
    compose.compose(random.Random(seed), style, combos) for seed in range(count)
  ]


def test_the_same_seed_draws_the_same_scene():
  style = compose.Style(text=0.5)
  for first, second in zip(_drawings(20, style), _drawings(20, style)):
    assert first.image.tobytes() == second.image.tobytes()
    assert first.objects == second.objects and first.words == second.words


def test_boxes_hold_exactly_the_sprites():
  checked = 0
  for drawing in _drawings(300):
    if drawing.texture != 'plain':
      continue
    pixels = np.asarray(drawing.image).astype(int)
    changed = np.ones(pixels.shape[:2], bool)
    inside = np.zeros(pixels.shape[:2], bool)
    for placed in drawing.objects:
      x1, y1, x2, y2 = placed.box
      inside[y1:y2, x1:x2] = True
    background = pixels[~inside]
    assert (background == background[0]).all(), 'nothing outside the boxes'
    changed = (pixels != background[0]).any(axis=-1)
    if len(drawing.objects) == 1:
      rows, columns = np.nonzero(changed)
      box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
      assert box == drawing.objects[0].box, 'no empty border'
      checked += 1
  assert checked > 10


def test_quads_hold_the_words():
  style = compose.Style(text=1, tilt=20)
  for drawing in _drawings(60, style):
    (painted,) = drawing.words
    assert painted.word in dict(things.WORDS)
    quad = np.array(painted.quad)
    assert (quad > -0.5).all() and (quad < style.side + 0.5).all()
    # Clockwise from the upper left: the first side runs to the right.
    first, second = quad[1] - quad[0], quad[2] - quad[1]
    assert first[0] > abs(first[1]) and second[1] > abs(second[0])
    if drawing.texture != 'plain':
      continue
    pixels = np.asarray(drawing.image).astype(int)
    inside = np.zeros(pixels.shape[:2], bool)
    for placed in drawing.objects:
      x1, y1, x2, y2 = placed.box
      inside[y1:y2, x1:x2] = True
    common = np.median(pixels.reshape(-1, 3), axis=0)
    ink = (np.abs(pixels - common).sum(axis=-1) > 150) & ~inside
    y, x = np.nonzero(ink)
    offsets = np.stack([x + 0.5, y + 0.5], axis=-1) - quad[0]
    along = offsets @ first / (first @ first)
    down = offsets @ second / (second @ second)
    for share in (along, down):
      assert share.min() > -0.1 and share.max() < 1.1
      assert share.max() - share.min() > 0.6, 'the word fills its quad'


def test_upright_words_stand_on_the_lattice():
  style = compose.Style(text=1, words=2)
  found = set()
  for drawing in _drawings(60, style):
    found.add(drawing.words[0].word)
    quad = np.array(drawing.words[0].quad)
    assert (quad % style.lattice == 0).all()
    assert quad.min() >= 0 and quad.max() <= style.side
  assert found == {*things.WORDS_EN[:2], *things.WORDS_ZH[:2]}


def test_every_character_of_a_word_is_drawn():
  for word, _ in things.WORDS:
    font, _ = fonts.find_font(word, 20, system=False)
    for character in word:
      assert font.getmask(character).getbbox(), f'{character} of {word}'


def test_sizes_counts_and_overlap_follow_the_style():
  style = compose.Style(side=112, text=0, counts=(0, 0, 1), sprite=(28, 42))
  drawings = _drawings(100, style)
  assert sum(len(x.objects) == 3 for x in drawings) > 95
  repeats = 0
  for drawing in drawings:
    boxes = [x.box for x in drawing.objects]
    for index, (x1, y1, x2, y2) in enumerate(boxes):
      assert 0 <= x1 < x2 <= style.side and 0 <= y1 < y2 <= style.side
      assert 28 <= max(x2 - x1, y2 - y1) <= 42
      assert not any(x % style.lattice for x in (x1, y1, x2, y2))
      for u1, v1, u2, v2 in boxes[:index]:
        width, height = min(x2, u2) - max(x1, u1), min(y2, v2) - max(y1, v1)
        if width > 0 and height > 0:
          areas = (x2 - x1) * (y2 - y1), (u2 - u1) * (v2 - v1)
          assert width * height <= style.overlap * min(areas)
    classes = [x.thing for x in drawing.objects]
    assert max(classes) < style.classes
    repeats += len(set(classes)) < len(classes)
  assert 20 < repeats < 80, 'some scenes repeat a class, not all'


def test_a_full_picture_still_has_its_object():
  style = compose.Style(side=60, text=1, font=(26, 26), sprite=(56, 58))
  for drawing in _drawings(50, style):
    assert len(drawing.objects) == 1 and len(drawing.words) == 1


def test_held_out_combinations():
  def reserved(drawing):
    return any(
      things.held_out(x.thing, drawing.colour) for x in drawing.objects
    )

  assert not any(map(reserved, _drawings(300)))
  assert all(map(reserved, _drawings(300, combos=True)))


def test_backgrounds_keep_to_their_colour():
  # Shades of two colours must not be confused: nearest mean is the right one.
  means = {index: [] for index in range(len(things.COLOURS))}
  for drawing in _drawings(400, compose.Style(counts=(1,), text=0)):
    pixels = np.asarray(drawing.image).astype(float)
    x1, y1, x2, y2 = drawing.objects[0].box
    outside = np.ones(pixels.shape[:2], bool)
    outside[y1:y2, x1:x2] = False
    means[drawing.colour].append(pixels[outside].mean(axis=0))
  centres = np.array([np.mean(x, axis=0) for x in means.values()])
  right = [
    np.argmin(((mean - centres) ** 2).sum(axis=-1)) == colour
    for colour, found in means.items()
    for mean in found
  ]
  assert np.mean(right) > 0.93
  textures = {x.texture for x in _drawings(60)}
  assert textures == set(things.TEXTURES)


def test_records_read_back(small_scenes):
  stored = small_scenes.open()
  for number in (0, 7, 123):
    rng = random.Random(f'scenes-0-train-{number}')
    drawing = compose.compose(rng, compose.Style())
    scene = stored[number]
    picture = Image.open(io.BytesIO(scene.image))
    assert picture.tobytes() == drawing.image.tobytes(), 'lossless'
    assert sorted(x.box for x in scene.objects) == sorted(
      x.box for x in drawing.objects
    )
    assert scene.colour == drawing.colour and scene.texture == drawing.texture
    assert [x.word for x in scene.words] == [x.word for x in drawing.words]
    assert [x.x for x in scene.objects] == sorted(x.x for x in scene.objects)


def test_splits_have_nothing_in_common(small_scenes):
  pictures = {
    split: {
      x.image
      for x in sources.Scenes(small_scenes.data_dir, split, 'small').open()
    }
    for split in ('train', 'test', 'combos')
  }
  assert [len(x) for x in pictures.values()] == [400, 60, 40]
  assert not pictures['train'] & pictures['test']


@pytest.mark.slow
def test_drawing_is_fast():
  _drawings(2000)  # Sprites of every size, once.
  start = time.process_time()
  for number in range(500):
    scenes.draw(scenes.CONFIGS['default'], 'train', number)
  assert (time.process_time() - start) / 500 < 4e-3
