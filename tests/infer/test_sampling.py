import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.sampling import Sampling

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32)


def kept(function, logits, setting):
  """Ids of the tokens that a filter leaves."""
  ranked, ids = sampling.rank(jnp.asarray(logits))
  left = np.isfinite(function(ranked, setting))
  return sorted(np.asarray(ids)[left].tolist())


@pytest.mark.parametrize(
  'k, expected',
  [(0, [0, 1, 2, 3, 4]), (1, [1]), (2, [1, 3]), (9, [0, 1, 2, 3, 4])],
)
def test_top_k(k, expected):
  assert kept(sampling.keep_top_k, np.log(PROBABILITIES), k) == expected


def test_top_k_keeps_what_equals_the_kth():
  assert kept(sampling.keep_top_k, jnp.array([1.0, 2, 1, 0]), 2) == [0, 1, 2]


@pytest.mark.parametrize(
  'p, expected',
  [
    (0.3, [1]),  # the released setting: one token is already more
    (0.39, [1]),
    (0.41, [1, 3]),
    (0.66, [1, 3, 4]),
    (1.0, [0, 1, 2, 3, 4]),
    (1e-6, [1]),
  ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, expected):
  assert kept(sampling.keep_top_p, np.log(PROBABILITIES), p) == expected


def test_top_p_counts_equals_one_by_one():
  assert kept(sampling.keep_top_p, jnp.zeros(4), 0.3) == [0, 1]


def test_top_p_drops_nothing_at_one():
  logits = jnp.array([30.0, 0.0, -30.0, -60.0])
  assert kept(sampling.keep_top_p, logits, 1.0) == [0, 1, 2, 3]


def test_filters_take_rows_apart():
  logits = jnp.log(jnp.stack([PROBABILITIES, PROBABILITIES[::-1] ** 2]))
  ranked, ids = sampling.rank(logits)
  assert ids[1].tolist() == [3, 1, 0, 4, 2]
  for function, setting in (
    (sampling.keep_top_p, 0.5),
    (sampling.keep_top_k, 2),
  ):
    np.testing.assert_array_equal(
      function(ranked, setting)[1], function(ranked[1], setting)
    )


def test_samples_follow_the_probabilities():
  keys = jax.random.split(jax.random.key(0), 4000)
  logits = np.broadcast_to(np.log(PROBABILITIES), (4000, 5))
  drawn = sampling.sample(logits, keys, 1.0, 0, 1.0)
  counts = np.bincount(drawn, minlength=5) / 4000
  np.testing.assert_allclose(counts, PROBABILITIES, atol=0.03)
  cold = sampling.sample(logits, keys, 0.5, 0, 1.0)
  squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()
  counts = np.bincount(cold, minlength=5) / 4000
  np.testing.assert_allclose(counts, squared, atol=0.03)
  assert set(sampling.sample(logits, keys, 1.0, 3, 0.6).tolist()) == {1, 3}


def test_ties_go_to_the_lowest_id():
  assert sampling.take_best(jnp.array([[1.0, 3, 3], [2, 2, 2]])).tolist() == [
    1,
    0,
  ]


@pytest.mark.parametrize(
  'settings',
  [
    {'temperature': -1.0},
    {'temperature': float('nan')},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 1.5},
  ],
)
def test_settings_out_of_range(settings):
  with pytest.raises(ConfigError, match=next(iter(settings))):
    Sampling(**settings)
