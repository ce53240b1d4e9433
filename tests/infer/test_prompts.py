import ml_dtypes
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer import prompts
from qwenvl_jax.model.config import AdapterConfig, DecoderConfig, QwenVLConfig

CONFIG = QwenVLConfig(
  adapter=AdapterConfig(queries=4, dim=8, heads=1),
  decoder=DecoderConfig(vocab_size=400, dim=8, max_position_embeddings=64),
  image_start_id=300,
)
SPAN = [300, 9, 9, 302, 302, 301]


def picture(side=28, dtype=np.uint8):
  return np.zeros((side, side, 3), dtype)


def test_buckets_are_few_and_waste_little():
  sizes = [prompts.bucket(n, 32) for n in range(1, 2049)]
  assert len(set(sizes)) == 13
  assert all(
    n <= size <= max(32, 1.5 * n) for n, size in enumerate(sizes, start=1)
  )


def test_spans_in_reading_order():
  ids = [5, *SPAN, 5, *SPAN, 7]
  assert prompts.image_starts(ids, CONFIG, 'x') == [2, 9]
  assert prompts.image_starts([7], CONFIG, 'x') == []


def test_an_image_start_inside_a_span_opens_nothing():
  ids = [300, 300, 300, 300, 300, 301, 300, 1, 2, 3, 4, 301, 9]
  assert prompts.image_starts(ids, CONFIG, 'x') == [1, 7]


@pytest.mark.parametrize(
  'ids, message',
  [
    (SPAN[:-1], r'row 1: the span of image 1 begins at token 0 of 5'),
    ([*SPAN, *SPAN[:3]], r'row 1: the span of image 2 begins at token 6 of 9'),
    ([*SPAN[:3], *SPAN[4:], 1], r'not 4 ids long'),
  ],
)
def test_spans_that_are_cut(ids, message):
  with pytest.raises(DataError, match=message):
    prompts.image_starts(ids, CONFIG, 'row 1')


@pytest.mark.parametrize(
  'dtype', [np.uint8, np.float32, np.float16, ml_dtypes.bfloat16]
)
def test_pixels_stay_what_they_are(dtype):
  images = prompts.match_images([1, 9], [picture(dtype=dtype)] * 2, 'x')
  assert images.shape == (2, 28, 28, 3)
  assert images.dtype == dtype


def test_no_images():
  assert len(prompts.match_images([], None, 'x')) == 0


@pytest.mark.parametrize(
  'starts, images, message',
  [
    ([1], None, r'row 1: 1 <img> spans in the tokens, but 0 images'),
    ([], [picture()], r'row 1: 0 <img> spans in the tokens, but 1 images'),
    ([1], [picture()[..., :1]], r'row 1: image 1 has shape'),
    ([1], [picture()[0]], r'row 1: image 1 has shape \(28, 3\)'),
    ([1, 9], [picture(), picture(14)], r'image 2 .* like the first'),
    ([1], [picture(dtype=np.int64)], r'row 1: image 1 is int64'),
    ([1], [picture(dtype=object)], r'row 1: image 1 is object'),
  ],
)
def test_images_that_do_not_fit(starts, images, message):
  with pytest.raises(DataError, match=message):
    prompts.match_images(starts, images, 'row 1')


def test_ids_become_an_array():
  for given in ([3, 4], np.array([3, 4], np.uint8), (3, 4)):
    ids = prompts.check_ids(given, CONFIG, 'x')
    assert ids.dtype == np.int32
    assert ids.tolist() == [3, 4]


@pytest.mark.parametrize(
  'ids, message',
  [
    ([], r'row 1: the prompt has shape'),
    ([[1, 2]], r'row 1: the prompt has shape \(1, 2\)'),
    ([400], r'row 1: id 400 is not in the vocabulary of 400'),
    ([-1], r'row 1: id -1'),
    ([1.5], r'row 1: the prompt is float64'),
    ('ab', r'row 1: the prompt has shape \(\)'),
    (['a', 'b'], r'row 1: the prompt is <U1'),
  ],
)
def test_ids_that_are_none(ids, message):
  with pytest.raises(DataError, match=message):
    prompts.check_ids(ids, CONFIG, 'row 1')


def test_one_entry_of_images_a_prompt():
  assert prompts.images_per_prompt([[1], [2]], None) == [None, None]
  with pytest.raises(DataError, match='2 prompts, but images for 1'):
    prompts.images_per_prompt([[1], [2]], [None])


def test_counts_are_at_least_one():
  prompts.check_count('beams', 1)
  with pytest.raises(ConfigError, match='beams=0'):
    prompts.check_count('beams', 0)
