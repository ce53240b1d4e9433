import pytest
import toy

from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer.beam import beam_search
from qwenvl_jax.infer.request import GenerationError


def test_matches_pytorch_whatever_the_neighbours(golden, golden_engine):
  ids, images = golden.prompt('one_image')
  expected = golden.new('beam3')
  other, _ = golden.prompt('text')
  found = beam_search(
    golden_engine,
    # Two searches fit the slots, the third waits.
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
  golden, golden_engine, beams, penalty, minimum, ids, score
):
  prompt, _ = golden.prompt('text')
  found = beam_search(
    golden_engine,
    [prompt],
    beams=beams,
    max_new_tokens=12,
    stop_ids=ENDS,
    length_penalty=penalty,
    min_new_tokens=minimum,
  )[0]
  assert found.ids == ids
  assert found.score == pytest.approx(score, abs=1e-3)


def test_one_beam_is_greedy(golden, golden_engine):
  prompt, _ = golden.prompt('text')
  (found,) = beam_search(
    golden_engine, [prompt], beams=1, max_new_tokens=12, stop_ids=ENDS
  )
  greedy = golden.new('text')
  end = next(i for i, token in enumerate(greedy) if token in ENDS)
  assert found.ids == greedy[:end]


def test_bad_input_names_the_row():
  engine = toy.engine(slots=2, max_len=64)

  def search(prompts, images=None, beams=2, **settings):
    settings = {'max_new_tokens': 4} | settings
    return beam_search(engine, prompts, images, beams=beams, **settings)

  assert search([]) == []
  with pytest.raises(ConfigError, match='beams=3 .* 2 slots'):
    search([[1]], beams=3)
  with pytest.raises(ConfigError, match='beams=0'):
    search([[1]], beams=0)
  with pytest.raises(DataError, match='row 1: 1 <img> spans'):
    search([[1], [*toy.SPAN, 1]])
  with pytest.raises(DataError, match='row 1: 61 prompt tokens'):
    search([[1], [1] * 61])
  with pytest.raises(DataError, match='2 prompts, but images for 1'):
    search([[1], [1]], [None])
  with pytest.raises(ConfigError, match='stop id 320'):
    search([[1]], stop_ids=(320,))
  engine.params = toy.damaged(engine.params, token=7)
  with pytest.raises(GenerationError, match='row 1: .* not finite'):
    search([[1, 2], [7]])
