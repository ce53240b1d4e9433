import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer import sampling
from qwenvl_jax.infer.sampling import Sampling, Settings

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32)


@pytest.fixture(scope='module')
def jitted():
  """The functions, compiled once for a shape."""
  return {
    name: jax.jit(getattr(sampling, name))
    for name in ('adjust', 'draw', 'keep_top_k', 'keep_top_p', 'truncate')
  }


def kept(filtered):
  """Ids of the tokens that a filter leaves, a list a row."""
  return [np.flatnonzero(row > -np.inf).tolist() for row in filtered]


def sorted_top_k(logits, k):
  """By sorting: what is at least as high as the k-th."""
  if k == 0 or k >= len(logits):
    return list(range(len(logits)))
  return np.flatnonzero(logits >= np.sort(logits)[-k]).tolist()


def sorted_top_p(logits, p):
  """By sorting: the fewest values that reach p, with all their equals."""
  if p >= 1:
    return list(range(len(logits)))
  weights = np.exp(logits - logits.max())
  weights /= weights.sum()
  reached = 0.0
  for value in np.unique(logits)[::-1]:
    reached += weights[logits == value].sum()
    if reached >= p:
      return np.flatnonzero(logits >= value).tolist()
  return list(range(len(logits)))


def rows_with_ties(rows=24, vocabulary=40):
  """Float32 rows; halves of integers are often equal, signs differ."""
  rng = np.random.default_rng(0)
  logits = rng.integers(-9, 9, (rows, vocabulary)).astype(np.float32) / 2
  logits[::3] = rng.normal(0, 3, logits[::3].shape)
  logits[1, :] = 0.0
  logits[2, 5:] = -1e30
  return logits


def test_top_k_is_what_sorting_finds(jitted):
  logits = rows_with_ties()
  for k in (0, 1, 2, 7, 39, 40, 41, 2**31 - 1):
    found = jitted['keep_top_k'](logits, np.full(len(logits), k))
    assert kept(found) == [sorted_top_k(row, k) for row in logits]


def test_top_p_is_what_sorting_finds(jitted):
  logits = rows_with_ties()
  for p in (1e-30, 0.05, 0.31, 0.5, 0.87, 0.999, 1.0):
    found = jitted['keep_top_p'](logits, np.full(len(logits), p, np.float32))
    assert kept(found) == [sorted_top_p(row.astype(float), p) for row in logits]


def test_filters_take_rows_apart(jitted):
  """Each row has its own setting, and gets what it gets alone."""
  logits = rows_with_ties()
  k, p = np.arange(24), np.linspace(0.01, 1, 24).astype(np.float32)
  for function, setting, by_sorting in (
    ('keep_top_k', k, sorted_top_k),
    ('keep_top_p', p, sorted_top_p),
  ):
    found = kept(jitted[function](logits, setting))
    for row in range(24):
      assert found[row] == by_sorting(logits[row].astype(float), setting[row])


@pytest.mark.parametrize(
  'p, expected',
  [
    (0.3, [1]),  # the released setting: one token is already more
    (0.39, [1]),
    (0.41, [1, 3]),
    (0.66, [1, 3, 4]),
    (1.0, [0, 1, 2, 3, 4]),
    (1e-6, [1]),
    (1e-60, [1]),  # 0 as a float32
  ],
)
def test_top_p_keeps_the_fewest_that_reach_p(jitted, p, expected):
  settings = Settings.create([Sampling(1.0, top_p=p)])
  logits = np.log(PROBABILITIES)[None]
  assert kept(jitted['truncate'](logits, settings)) == [expected]


def test_top_p_drops_nothing_at_one(jitted):
  logits = np.array([[30.0, 0.0, -30.0, -60.0]], np.float32)
  assert kept(jitted['keep_top_p'](logits, np.ones(1))) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
  'p, expected',
  [(0.0, 5), (0.12, 5), (0.2, 4), (0.5, 3), (0.7, 1), (1.0, 1)],
)
def test_min_p_is_a_share_of_the_best(jitted, p, expected):
  settings = Settings.create([Sampling(1.0, min_p=p)])
  logits = np.log(PROBABILITIES)[None]
  (left,) = kept(jitted['truncate'](logits, settings))
  assert left == sorted(np.argsort(-PROBABILITIES)[:expected].tolist())


def test_top_k_comes_before_top_p_and_both_after_the_temperature(jitted):
  """Of the best 3 the probabilities are 0.47, 0.29 and 0.24."""
  logits = np.log(PROBABILITIES)[None]
  for settings, expected in (
    ({'top_k': 3, 'top_p': 0.75}, [1, 3]),
    ({'top_k': 3, 'top_p': 0.77}, [1, 3, 4]),
    ({'top_k': 3, 'min_p': 0.6}, [1, 3]),
  ):
    settings = Settings.create([Sampling(1.0, **settings)])
    assert kept(jitted['truncate'](logits, settings)) == [expected]
  # Colder, one token is enough; hotter, three are needed.
  for temperature, expected in ((0.2, {1}), (1.0, {1, 3}), (9.0, {1, 3, 4})):
    drawn = draw_many(jitted, Sampling(temperature, top_p=0.62))
    assert set(drawn) == expected


def draw_many(jitted, setting, count=2000):
  """Ids of so many draws from `PROBABILITIES`, each with a seed of its own."""
  settings = jax.tree.map(
    lambda x: np.repeat(x, count, 0), Settings.create([setting])
  )
  keys = np.random.default_rng(0).integers(0, 2**32, (count, 2), np.uint32)
  settings = Settings(**{**vars(settings), 'key': keys})
  logits = np.broadcast_to(np.log(PROBABILITIES), (count, 5))
  return jitted['draw'](logits, settings, np.zeros(count, np.int32)).tolist()


def test_samples_follow_the_probabilities(jitted):
  counts = np.bincount(draw_many(jitted, Sampling(1.0)), minlength=5) / 2000
  np.testing.assert_allclose(counts, PROBABILITIES, atol=0.04)
  counts = np.bincount(draw_many(jitted, Sampling(0.5)), minlength=5) / 2000
  squared = PROBABILITIES**2 / (PROBABILITIES**2).sum()
  np.testing.assert_allclose(counts, squared, atol=0.04)


def test_a_draw_depends_on_seed_and_step_and_not_on_the_neighbours(jitted):
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 2, (6, 40)).astype(np.float32)
  mixed = [
    Sampling(1.3, seed=5),
    Sampling(),
    Sampling(1.3, top_k=4, seed=5),
    Sampling(0.7, top_p=0.5, seed=(5, 1)),
    Sampling(1.3, min_p=0.1, seed=-5),
    Sampling(1.3, seed=2**70),
  ]
  steps = np.array([0, 1, 2, 3, 4, 5], np.int32)
  together = jitted['draw'](logits, Settings.create(mixed), steps)
  for row, setting in enumerate(mixed):
    alone = Settings.create([setting])
    one = slice(row, row + 1)
    assert jitted['draw'](logits[one], alone, steps[one]) == together[row]
  assert together[1] == logits[1].argmax()


def test_every_part_of_a_seed_counts(jitted):
  seeds = [0, 1, -1, 2**32, 2**64, (0,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]
  keys = Settings.create([Sampling(1.0, seed=seed) for seed in seeds]).key
  # 0 and (0,) are the same.
  assert len(np.unique(keys, axis=0)) == len(seeds) - 1
  # The same draws at every step would say the same word again and again.
  settings = Settings.create([Sampling(2.0)] * 64)
  logits = np.zeros((64, 1000), np.float32)
  drawn = jitted['draw'](logits, settings, np.arange(64, dtype=np.int32))
  assert len(set(drawn.tolist())) > 50


def test_ties_go_to_the_lowest_id():
  logits = jnp.array([[1.0, 3, 3], [2, 2, 2]])
  assert sampling.take_best(logits).tolist() == [1, 0]


def adjusted(
  jitted, logits, settings, counts, in_prompt, generated=3, masks=None
):
  """One row through `adjust`."""
  row = jitted['adjust'](
    np.asarray(logits, np.float32)[None],
    Settings.create([settings]),
    np.asarray(counts, np.int32)[None],
    np.asarray(in_prompt, bool)[None],
    np.array([generated], np.int32),
    masks,
  )
  return row[0].tolist()


LOGITS = [2.0, -2.0, 2.0, -2.0, 1.0]
COUNTS = [3, 1, 0, 0, 0]
IN_PROMPT = [False, False, True, True, False]


@pytest.mark.parametrize(
  'settings, expected',
  [
    ({}, LOGITS),
    # Answer and prompt alike, once whatever their number.
    ({'repetition_penalty': 2.0}, [1.0, -4.0, 1.0, -4.0, 1.0]),
    ({'repetition_penalty': 0.5}, [4.0, -1.0, 4.0, -1.0, 1.0]),
    # The answer only.
    ({'presence_penalty': 0.5}, [1.5, -2.5, 2.0, -2.0, 1.0]),
    ({'frequency_penalty': 0.5}, [0.5, -2.5, 2.0, -2.0, 1.0]),
    ({'frequency_penalty': -1.0}, [5.0, -1.0, 2.0, -2.0, 1.0]),
    (
      {
        'repetition_penalty': 2.0,
        'presence_penalty': 0.25,
        'frequency_penalty': 0.5,
        'logit_bias': {0: 1.0, 4: -100.0},
      },
      [0.25, -4.75, 1.0, -4.0, -99.0],
    ),
    ({'logit_bias': {2: 7.5}}, [2.0, -2.0, 9.5, -2.0, 1.0]),
  ],
)
def test_penalties_and_biases(jitted, settings, expected):
  assert (
    adjusted(jitted, LOGITS, Sampling(**settings), COUNTS, IN_PROMPT)
    == expected
  )


def test_penalties_are_those_of_the_row(jitted):
  settings = Settings.create(
    [Sampling(), Sampling(presence_penalty=1.0), Sampling(logit_bias={0: 1})]
  )
  rows = np.array([LOGITS] * 3, np.float32)
  found = jitted['adjust'](
    rows,
    settings,
    np.array([COUNTS] * 3),
    np.array([IN_PROMPT] * 3),
    np.zeros(3, np.int32),
  )
  assert found.tolist() == [
    LOGITS,
    [1.0, -3.0, 2.0, -2.0, 1.0],
    [3.0, *LOGITS[1:]],
  ]


def test_no_stop_before_the_minimum(jitted):
  settings = Sampling(stop_ids=(0, 4), min_new_tokens=3)
  none = [0] * 5
  for generated in (0, 2):
    found = adjusted(jitted, LOGITS, settings, none, none, generated)
    assert found == [-np.inf, -2.0, 2.0, -2.0, -np.inf]
  for generated in (3, 4):
    found = adjusted(jitted, LOGITS, settings, none, none, generated)
    assert found == LOGITS


def test_masks_are_bits_from_the_lowest(jitted):
  logits = np.arange(70, dtype=np.float32)
  allowed = [0, 31, 32, 64, 69]
  masks = np.zeros((1, 3), np.uint32)
  for token in allowed:
    masks[0, token // 32] |= np.uint32(1 << token % 32)
  none = np.zeros(70)
  found = adjusted(jitted, logits, Sampling(), none, none, 0, masks)
  assert kept([np.array(found)]) == [allowed]
  assert found[69] == 69.0


@pytest.mark.parametrize(
  'settings',
  [
    {'temperature': -1.0},
    {'temperature': float('nan')},
    {'temperature': 1e-40},  # below the smallest float32
    {'temperature': 1e300},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 1.5},
    {'min_p': -0.1},
    {'min_p': 1.1},
    {'repetition_penalty': 0.0},
    {'repetition_penalty': 1e-300},
    {'repetition_penalty': float('inf')},
    {'presence_penalty': 2.5},
    {'frequency_penalty': float('nan')},
    {'min_new_tokens': -1},
    {'stop_ids': tuple(range(17))},
    {'logit_bias': dict.fromkeys(range(301), 1.0)},
    {'logit_bias': {3: 101.0}},
    {'logit_bias': {3: float('nan')}},
  ],
)
def test_settings_out_of_range(settings):
  name = next(iter(settings)).replace('stop_ids', 'stop ids')
  with pytest.raises(ConfigError, match=name):
    Sampling(**settings)


def test_the_extremes_that_are_allowed_choose_a_token(jitted):
  """All numbers stay finite, also where tokens are ruled out."""
  logits = np.array([[-np.inf, 1e4, -1e4, 0.0, -np.inf]], np.float32)
  for setting in (
    Sampling(sampling.MIN_TEMPERATURE),
    Sampling(sampling.MAX_TEMPERATURE, top_p=1e-60),
    Sampling(1.0, top_k=2**40, min_p=1.0),
  ):
    settings = Settings.create([setting])
    drawn = jitted['draw'](logits, settings, np.zeros(1, np.int32))
    assert drawn[0] in (1, 2, 3)
  for penalty in (1e-3, 1e3):
    setting = Sampling(repetition_penalty=penalty, logit_bias={1: -100.0})
    found = adjusted(
      jitted, [1e4, -1e4, 0.0, 1.0, 2.0], setting, [1] * 5, [1] * 5
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'stop_ids': (3, 400)}, 'stop id 400 .* 400'),
    ({'stop_ids': (-1,)}, 'stop id -1'),
    ({'logit_bias': {400: 1.0}}, 'logit_bias of token 400'),
  ],
)
def test_ids_outside_the_vocabulary(settings, message):
  with pytest.raises(ConfigError, match=message):
    Sampling(**settings).check_ids(400)
