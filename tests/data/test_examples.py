import numpy as np
import pytest

from qwenvl_jax.data import questions
from qwenvl_jax.data.examples import Sample, encode_sample, plain
from qwenvl_jax.errors import DataError
from qwenvl_jax.text.chatml import TextSpan
from qwenvl_jax.text.tokenizer import Tokenizer

_TOKENIZER = Tokenizer()


def _branch(prompt, answer):
  return TextSpan(prompt), TextSpan(answer, loss=True)


_IMAGE = (TextSpan('<img>0</img>'),)


def _sample(*branches, prefix=_IMAGE, images=(b'',)):
  return Sample('a/record', prefix, branches, images)


def test_branches_continue_the_trunk():
  sample = _sample(_branch('a?', ' yes'), _branch('b c?', ' no'))
  encoded = encode_sample(sample, _TOKENIZER, image_tokens=4)
  first = _TOKENIZER.encode('a?') + _TOKENIZER.encode(' yes')
  second = _TOKENIZER.encode('b c?') + _TOKENIZER.encode(' no')
  assert encoded.tokens[6:].tolist() == first + second
  assert encoded.branch_ids.tolist() == [0] * 6 + [1] * 3 + [2] * 4
  assert encoded.positions.tolist() == [*range(9), *range(6, 10)]
  assert encoded.weights.tolist() == [0] * 8 + [1] + [0] * 3 + [1]
  assert encoded.image_starts == (1,)
  assert encoded.tokens[0] == _TOKENIZER.img_start_id
  assert encoded.tokens[5] == _TOKENIZER.img_end_id


def test_pieces_are_split_as_the_whole_text_is(two_apples_and_a_cat):
  # In use the prompt alone is encoded, and the answer follows token by token:
  # a merge across the border would make training and use differ.
  for question in questions.enumerate_all(two_apples_and_a_cat, 16):
    whole = _TOKENIZER.encode(''.join(x.text for x in question.spans()))
    parts = [_TOKENIZER.encode(x.text) for x in question.spans()]
    assert sum(parts, []) == whole, question
    sample = Sample('a/record', question.spans())
    assert encode_sample(sample, _TOKENIZER, 4).tokens.tolist() == whole


def test_length_alpha_weighs_answers_rather_than_tokens():
  sample = _sample(_branch('a', ' b c d e'), _branch('a', ' b'))
  for alpha, long, short in ((0, 4, 1), (1, 1, 1), (0.5, 2, 1)):
    encoded = encode_sample(sample, _TOKENIZER, 4, length_alpha=alpha)
    for branch, total in ((1, long), (2, short)):
      weights = encoded.weights[encoded.branch_ids == branch]
      np.testing.assert_allclose(weights.sum(), total)


def test_branches_that_do_not_fit_are_left_out_whole():
  sample = _sample(
    _branch('a', ' b'), _branch('a', ' b c d e f g h'), _branch('x', ' y')
  )
  encoded = encode_sample(sample, _TOKENIZER, 4, max_length=10)
  assert _TOKENIZER.decode(encoded.tokens[6:]) == 'a bx y'
  assert encoded.branch_ids.max() == 2


def test_plain_writes_the_first_branch_on():
  sample = plain(_sample(_branch('a?', ' yes'), _branch('b?', ' no')))
  encoded = encode_sample(sample, _TOKENIZER, 4)
  assert not encoded.branch_ids.any()
  assert encoded.positions.tolist() == list(range(9))
  assert _TOKENIZER.decode(encoded.tokens).endswith('a? yes')


@pytest.mark.parametrize(
  ('sample', 'says'),
  [
    (_sample(_branch('<ref>a', ' b')), '<ref> at character 0 is not closed'),
    (_sample(prefix=(TextSpan('<img>0'),)), 'is not closed'),
    (_sample(_branch('a', '</box>')), 'closes nothing'),
    (_sample((TextSpan('a', loss=True),)), 'begins with loss'),
    (_sample(prefix=(TextSpan('no image'),)), '0 <img> spans for 1 images'),
    (_sample(images=(b'', b'')), '1 <img> spans for 2 images'),
  ],
)
def test_errors_name_the_record(sample, says):
  with pytest.raises(DataError, match=says) as error:
    encode_sample(sample, _TOKENIZER, 4)
  assert 'a/record' in str(error.value)
