import numpy as np
import pytest
import toy

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer.request import (
  Answer,
  Request,
  Token,
  check_fits,
)
from qwenvl_jax.infer.sampling import Sampling


def ask(tokens=(1, 2, 3), images=None, **settings):
  return Request.create(toy.config(), tokens, images, **settings)


def test_images_go_to_their_spans_in_reading_order():
  shown = [toy.picture(0), toy.picture(1)]
  request = ask([5, *toy.SPAN, 6, *toy.SPAN, 7], shown)
  assert request.image_starts == (2, 21)
  for given, kept in zip(shown, request.images, strict=True):
    np.testing.assert_array_equal(given, kept)


@pytest.mark.parametrize(
  'settings, kind, message',
  [
    ({'tokens': []}, DataError, 'the prompt has shape'),
    ({'tokens': [toy.VOCABULARY]}, DataError, 'id 320 is not in'),
    ({'tokens': [*toy.SPAN, 1]}, DataError, '1 <img> spans'),
    ({'max_new_tokens': 0}, ConfigError, 'max_new_tokens=0'),
    ({'timeout': 0}, ConfigError, 'timeout=0'),
    ({'timeout': float('nan')}, ConfigError, 'timeout=nan'),
    ({'top_logprobs': 21}, ConfigError, 'top_logprobs=21'),
    ({'top_logprobs': -1}, ConfigError, 'top_logprobs=-1'),
    ({'sampling': Sampling(stop_ids=(320,))}, ConfigError, 'stop id 320'),
    ({'sampling': Sampling(logit_bias={-1: 1})}, ConfigError, 'token -1'),
  ],
)
def test_requests_that_cannot_be(settings, kind, message):
  with pytest.raises(kind, match=message):
    ask(**settings)


def test_room_of_the_engine():
  check_fits(ask([1] * 60, max_new_tokens=4), 64, 1, 'row 7')
  for request, message in (
    (ask([1] * 60, max_new_tokens=5), r'row 7: 60 prompt .* at most 4'),
    (ask([1] * 64, max_new_tokens=1), r'row 7: 64 tokens .* shorten'),
    (
      ask([1, *toy.SPAN, *toy.SPAN, 2], [toy.picture(0)] * 2, max_new_tokens=1),
      r'row 7: 2 images are more than the 1',
    ),
  ):
    with pytest.raises(DataError, match=message):
      check_fits(request, 64, 1, 'row 7')


def test_an_answer_tells_its_listener():
  heard = []
  answer = Answer(ask(), lambda a: heard.append((a.ids, a.finish_reason)))
  answer.add(Token(4))
  answer.add(Token(5))
  answer.finish('length')
  assert heard == [([4], None), ([4, 5], None), ([4, 5], 'length')]
  assert answer.finished


def test_a_listener_that_fails_is_not_told_again():
  calls = []

  def listener(answer):
    calls.append(answer)
    raise RuntimeError('gone')

  answer = Answer(ask(), listener)
  answer.add(Token(4))
  assert answer.abandoned
  answer.add(Token(5))
  assert len(calls) == 1
  assert answer.ids == [4, 5]
