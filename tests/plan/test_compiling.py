import pytest

from qwenvl_jax.plan.compiling import needed_bytes


@pytest.mark.parametrize(
  ('message', 'needed'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.00G '
      'of 15.75G hbm. Exceeded hbm capacity by 9.25G.',
      25 * 2**30,
    ),
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (50.5G) exceeds available HBM (15.75G).',
      101 * 2**29,
    ),
    ('XLA:TPU compile permanent error. Used 512.0M of 1.5G hbm', 2**29),
    ('Ran out of memory in memory space vmem. Used 20M of 16M vmem', None),
  ],
)
def test_what_the_compiler_says_it_needs(message, needed):
  assert needed_bytes(message) == needed
