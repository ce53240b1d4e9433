import json
import pathlib

import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.schedule import warmup_cosine

TRAJECTORY = (
  pathlib.Path(__file__).parents[1] / 'goldens' / 'tiny' / 'trajectory.json'
)


@pytest.mark.parametrize('stage', ['stage1', 'stage2', 'stage3'])
def test_rates_are_those_of_the_trajectory(stage):
  golden = json.loads(TRAJECTORY.read_text())[stage]
  rate = warmup_cosine(
    golden['peak'], golden['end'], golden['warmup'], golden['steps']
  )
  rates = [float(rate(k)) for k in range(golden['steps'])]
  assert rates == pytest.approx(golden['lr'], rel=1e-5)


def test_stays_at_the_end():
  rate = warmup_cosine(1e-3, 1e-5, 0, 10)
  assert float(rate(0)) == pytest.approx(1e-3)
  assert float(rate(10)) == float(rate(1000)) == pytest.approx(1e-5)


def test_a_warmup_as_long_as_the_run_is_refused():
  with pytest.raises(ConfigError, match='warmup=10 of steps=10'):
    warmup_cosine(1e-3, 1e-5, 10, 10)
