import fake
import pytest

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.train.loop import train
from qwenvl_jax.train.profile import parse_steps


def test_some_steps_are_traced(tmp_path, capsys):
  train(fake.line_run(steps=5, profile_steps=(2, 3)), tmp_path)
  (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
  content = trace.read_bytes()
  assert b'train' in content
  said = capsys.readouterr().err
  assert 'profiled steps 2 to 3: pip install xprof' in said
  assert f'xprof --logdir={tmp_path}/profile' in said


def test_a_run_that_ends_before_keeps_what_it_has(tmp_path):
  train(fake.line_run(steps=3, profile_steps=(2, 9)), tmp_path)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def test_steps_are_two_numbers():
  assert parse_steps('10:15') == (10, 15)
  for text in ('10', '10:', 'a:b', '5:2', '0:3'):
    with pytest.raises(ConfigError, match='profile_steps='):
      parse_steps(text)
