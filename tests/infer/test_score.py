import jax
import numpy as np
import pytest
import toy

from qwenvl_jax.errors import DataError
from qwenvl_jax.infer.score import score


def log_softmax(logits):
  return np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=-1))


@pytest.mark.parametrize(
  # The last 64 of 805 tokens, read in two pieces; past `seq_length` either way.
  'case, length',
  [('text', 8), ('two_images', 500), ('long_text', 745)],
)
def test_the_logits_of_pytorch(golden, golden_engine, case, length):
  ids = golden.expected[f'eval/{case}/ids'][0].tolist()
  last = golden.expected[f'eval/{case}/logits_last64'][0]
  (found,) = score(
    golden_engine,
    [ids[:length]],
    [ids[length:]],
    [golden.images(ids)],
    top=3,
  )
  count = len(ids) - length
  expected = log_softmax(last)[-count - 1 : -1]
  assert found.logprobs.shape == (count,)
  np.testing.assert_allclose(
    found.logprobs, expected[np.arange(count), ids[length:]], atol=2e-4
  )
  order = np.argsort(-expected, axis=1)[:, :3]
  np.testing.assert_array_equal(found.top_ids, order)
  np.testing.assert_allclose(
    found.top_logprobs, np.take_along_axis(expected, order, 1), atol=2e-4
  )


@pytest.fixture(scope='module')
def engine():
  return toy.engine(slots=1, max_len=300, chunk=128)


def test_rows_are_scored_apart(engine):
  prompts = [toy.prompt(1, 40, 1), [5], toy.prompt(2, 130)]
  more = [[6, 7], [8, 9, 10], toy.prompt(3, 100)]
  images = [[toy.picture(0)], None, None]
  together = score(engine, prompts, more, images, top=1)
  for row in range(3):
    (alone,) = score(engine, [prompts[row]], [more[row]], [images[row]], top=1)
    for a, b in zip(alone, together[row], strict=True):
      np.testing.assert_array_equal(a, b)
    assert len(alone.logprobs) == len(more[row])
    assert (alone.logprobs <= alone.top_logprobs[:, 0]).all()
  # Another picture, other scores.
  (other,) = score(engine, prompts[:1], more[:1], [[toy.picture(1)]], top=1)
  assert (other.logprobs != together[0].logprobs).any()


def test_nothing_to_score(engine):
  assert score(engine, [], []) == []
  for prompt in ([5], [5, 6]):
    (found,) = score(engine, [prompt], [[]])
    assert found.logprobs.shape == (0,)
    assert found.top_ids.shape == (0, 0)


def test_the_whole_room_may_be_used(engine):
  (found,) = score(engine, [[5] * 298], [[6, 7]])
  assert len(found.logprobs) == 2
  with pytest.raises(DataError, match='row 0: 301 tokens'):
    score(engine, [[5] * 298], [[6, 7, 8]])


@pytest.mark.parametrize(
  'prompts, more, images, top, message',
  [
    ([[1]], [], None, 0, '1 prompts, 0 continuations'),
    ([[1]], [[2]], [None, None], 0, 'images for 2'),
    ([[1], []], [[2], [3]], None, 0, 'row 1: the prompt is empty'),
    ([[1], [1]], [[2], [320]], None, 0, 'row 1: id 320'),
    ([[1], toy.SPAN], [[2], [3]], None, 0, 'row 1: 1 <img> spans'),
    ([[1]], [[2]], None, 21, 'top=21'),
  ],
)
def test_bad_input_names_the_row(engine, prompts, more, images, top, message):
  with pytest.raises(DataError, match=message):
    score(engine, prompts, more, images, top=top)
