import pytest

from qwenvl_jax.infer.beam import beam_search
from qwenvl_jax.infer.generate import cut


def search(golden, prompts, images=None, **settings):
  return beam_search(golden.model, golden.params, prompts, images, **settings)


def test_matches_pytorch_whatever_the_neighbours(golden):
  ids, images = golden.prompt('one_image')
  expected = golden.new('beam3')
  other, _ = golden.prompt('text')
  found = search(
    golden,
    [other, ids, other[:5]],
    [None, images, None],
    beams=3,
    max_new_tokens=len(expected),
    length_penalty=0.0,
  )
  assert found[1].ids == expected
  assert expected != golden.new('one_image')[: len(expected)]


# (beams, length_penalty, min_new_tokens, ids, score) for the golden `text`
# prompt with end tokens 43, 96 and 103: computed with `transformers` 5.23,
# `model.generate(..., early_stopping=False)`.
ENDS = (43, 96, 103)
LONG = [116, 225, 94, 289, 295, 84, 179, 398, 214, 19, 295, 296]
REFERENCE = [
  (3, 0.0, 0, [116, 225], -7.3468),
  (3, 1.0, 0, [*LONG[:4], 292, 113, 175, 113, 24, 202, 84, 82], -2.0362),
  (4, 2.0, 0, LONG, -0.1629),
  (4, 0.0, 6, LONG, -23.4594),
]


@pytest.mark.parametrize('beams, penalty, minimum, ids, score', REFERENCE)
def test_end_tokens_length_penalty_and_minimum(
  golden, beams, penalty, minimum, ids, score
):
  prompt, _ = golden.prompt('text')
  found = search(
    golden,
    [prompt],
    beams=beams,
    max_new_tokens=12,
    stop_ids=ENDS,
    length_penalty=penalty,
    min_new_tokens=minimum,
  )[0]
  assert found.ids == ids
  assert found.score == pytest.approx(score, abs=1e-3)


def test_one_beam_is_greedy(golden):
  prompt, _ = golden.prompt('text')
  found = search(golden, [prompt], beams=1, max_new_tokens=12, stop_ids=ENDS)[0]
  assert found.ids == cut(golden.new('text'), ENDS)
