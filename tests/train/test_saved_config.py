import doctest

import pytest

from qwenvl_jax.train import saved_config
from qwenvl_jax.train.saved_config import changes, save

GIN = """from __gin__ import dynamic_registration
from qwenvl_jax.train import optimizer

# Macros:
# ==========
PEAK = 0.1

# Parameters for optimizer.OptimizerConfig:
# ==========
optimizer.OptimizerConfig.peak = %PEAK
optimizer.OptimizerConfig.trainable = \\
    ('adapter/.*',
     'decoder/.*')
optimizer.OptimizerConfig.warmup = 10
"""


def test_the_example():
  assert not doctest.testmod(saved_config).failed


def test_each_binding_that_differs_has_a_line():
  new = GIN.replace('0.1', '0.2').replace("'decoder/.*'", "'vision/.*'")
  new = new.replace('optimizer.OptimizerConfig.warmup = 10\n', '')
  assert changes(GIN, new) == [
    'PEAK: 0.1 -> 0.2',
    "optimizer.OptimizerConfig.trainable: ('adapter/.*', 'decoder/.*') -> "
    "('adapter/.*', 'vision/.*')",
    'optimizer.OptimizerConfig.warmup: 10 -> not bound',
  ]
  # How a value is broken into lines is no difference.
  joined = GIN.replace("\\\n    ('adapter/.*',\n     ", "('adapter/.*', ")
  assert joined != GIN and changes(GIN, joined) == []


@pytest.mark.parametrize('there', ['disk', 'bucket'])
def test_earlier_configurations_are_kept(there, tmp_path, request):
  folder = tmp_path
  if there == 'bucket':
    from qwenvl_jax import buckets

    folder = buckets.as_path(f'{request.getfixturevalue("bucket").url}/run')
  assert save(folder, 'A = 1\n') == []
  assert save(folder, 'A = 1\n') == []
  assert save(folder, 'A = 2\n') == ['A: 1 -> 2']
  assert save(folder, 'A = 3\n') == ['A: 2 -> 3']
  names = 'config.gin', 'config.2.gin', 'config.1.gin'
  assert [(folder / name).read_text() for name in names] == [
    'A = 3\n',
    'A = 2\n',
    'A = 1\n',
  ]
