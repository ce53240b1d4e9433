import numpy as np
import pytest

from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.errors import DataError
from qwenvl_jax.infer import prompts
from qwenvl_jax.model.config import AdapterConfig, DecoderConfig, QwenVLConfig
from qwenvl_jax.model.vision import normalize_pixels

CONFIG = QwenVLConfig(
  adapter=AdapterConfig(queries=4, dim=8, heads=1),
  decoder=DecoderConfig(vocab_size=400, dim=8, max_position_embeddings=64),
  image_start_id=300,
)
SPAN = [300, 9, 9, 302, 302, 301]


def picture(value=0, side=28, dtype=np.uint8):
  return np.full((1, side, side, 3), value, dtype)


def test_buckets_are_few_and_waste_little():
  sizes = [prompts.bucket(n, 32) for n in range(1, 2049)]
  assert len(set(sizes)) == 13
  assert all(
    n <= size <= max(32, 1.5 * n) for n, size in enumerate(sizes, start=1)
  )


def test_rows_are_padded_on_the_left():
  batch = prompts.pad_prompts(CONFIG, [[5, 6, 7], [8]], None, rows=3, length=4)
  assert batch.tokens.tolist()[:2] == [[0, 5, 6, 7], [0, 0, 0, 8]]
  assert batch.segment_ids.sum(1).tolist() == [3, 1, 0]
  assert batch.positions[0].tolist() == [0, 0, 1, 2]
  assert batch.image_starts.shape == (3, 0)


def test_images_go_to_their_spans_in_reading_order():
  two = np.concatenate([picture(1), picture(2)])
  batch = prompts.pad_prompts(
    CONFIG,
    [[5, *SPAN, 5, *SPAN, 7], [7], [*SPAN, 1]],
    [two, None, picture(3)],
    rows=4,
    length=16,
  )
  missing = NO_IMAGE
  assert batch.image_starts.tolist() == [
    [3, 10],
    [missing, missing],
    [10, missing],
    [missing, missing],
  ]
  assert batch.pixels[0, :, 0, 0, 0].tolist() == [1, 2]
  assert batch.pixels[2, 0, 0, 0, 0] == 3
  assert batch.pixels.dtype == np.uint8


def test_a_float_picture_makes_the_batch_float():
  batch = prompts.pad_prompts(
    CONFIG,
    [[*SPAN, 1], [*SPAN, 1]],
    [picture(200), picture(0.5, dtype=np.float32)],
    rows=2,
    length=8,
  )
  np.testing.assert_allclose(
    batch.pixels[0, 0], normalize_pixels(picture(200)[0]), atol=1e-6
  )
  assert (batch.pixels[1] == 0.5).all()


def test_an_image_start_inside_a_span_opens_nothing():
  ids = [300, 300, 300, 300, 300, 301, 300, 1, 2, 3, 4, 301, 9]
  assert prompts.image_starts(ids, CONFIG, 'x') == [1, 7]


@pytest.mark.parametrize(
  'ids, images, message',
  [
    (
      SPAN[:-1],
      picture(),
      r'the span of image 1 begins at token 0 of 5',
    ),
    ([*SPAN[:3], *SPAN[4:], 1], picture(), r'not 4 ids long'),
    ([*SPAN, 1], None, r'row 1: 1 <img> spans in the tokens, but 0 images'),
    ([1], picture(), r'row 1: 0 <img> spans in the tokens, but 1 images'),
    (
      [*SPAN, 1],
      picture(side=14),
      r'images of \(14, 14, 3\), but row 0',
    ),
    ([*SPAN, 1], picture()[..., :1], r'row 1: image 1 has shape'),
    ([], None, r'row 1: the prompt has shape'),
    ([400], None, r'row 1: id 400 is not in the vocabulary of 400'),
    ([-1], None, r'row 1: id -1'),
  ],
)
def test_errors_name_the_row(ids, images, message):
  with pytest.raises(DataError, match=message):
    prompts.pad_prompts(
      CONFIG, [[*SPAN, 1], ids], [picture(), images], rows=2, length=16
    )


def test_prompt_and_answer_must_fit_the_positions():
  prompts.check_room([1] * 60, 4, CONFIG, 'row 7')
  with pytest.raises(DataError, match=r'row 7: 60 prompt .* the 64 positions'):
    prompts.check_room([1] * 60, 5, CONFIG, 'row 7')
