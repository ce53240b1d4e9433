import importlib.util

import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan import topology

needs_libtpu = pytest.mark.skipif(
  not importlib.util.find_spec('libtpu'), reason='needs libtpu'
)


def test_names():
  one = topology.parse('v5p:4x4x8')
  assert (one.chips, one.name) == (128, 'v5p:4x4x8')
  several = topology.parse('v5e:16x16', slices=4)
  assert (several.chips, several.name) == (1024, '4 x v5e:16x16')


@pytest.mark.parametrize(
  ('name', 'slices', 'message'),
  [
    ('v7:2x2', 1, 'v4, v5e, v5p, v6e'),
    ('v5e-256', 1, 'v4, v5e, v5p, v6e'),
    ('v5e:32x32', 1, 'v5e:8x16, v5e:16x16'),
    ('v5p:8x8', 1, 'v5p:4x4x4'),
    ('v5e:16x16', 0, 'at least one'),
  ],
)
def test_what_there_is_not(name, slices, message):
  with pytest.raises(ConfigError, match=message):
    topology.parse(name, slices)


@needs_libtpu
@pytest.mark.parametrize(
  ('name', 'slices'),
  [
    ('v4:2x2x4', 1),
    ('v4:4x4x4', 1),
    ('v5e:1x1', 1),
    ('v5e:2x4', 1),
    ('v5e:4x4', 2),
    ('v5p:4x4x4', 1),
    ('v6e:16x16', 1),
  ],
)
def test_the_compiler_knows_them(name, slices):
  wanted = topology.parse(name, slices)
  assert len(topology.devices(wanted)) == wanted.chips


@pytest.mark.parametrize('chip', topology.CHIPS.values(), ids=lambda c: c.name)
def test_all_topologies_are_shapes_of_the_network(chip):
  for shape in chip.topologies:
    assert topology.parse(f'{chip.name}:{shape}').chips >= 1
    assert shape.count('x') + 1 == chip.axes


def test_a_missing_compiler_is_said(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'qwenvl_jax\[plan\]'"):
    topology.devices(topology.parse('v5e:2x2'))
