"""Phases are numbered, and what is left is estimated from what was."""

import pytest

from qwenvl_jax.quickstart import phases as phases_lib
from qwenvl_jax.quickstart.__main__ import STAGES
from qwenvl_jax.quickstart.phases import EXPECTED, Phases


@pytest.fixture
def clock(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(phases_lib.time, 'monotonic', lambda: now[0])
  return now


def test_the_estimate_follows_the_pace_of_this_machine(clock, capsys):
  phases = Phases(EXPECTED)
  phases.skip('data')
  phases.begin('decoder')
  rest = sum(EXPECTED.values()) - EXPECTED['data']
  minutes = round(rest / 60)
  assert capsys.readouterr().out == (
    f'\n== phase 2 of 7: decoder (all that is left: about {minutes} minutes)\n'
  )
  clock[0] += 3 * EXPECTED['decoder']
  assert phases.end('decoder') == 3 * EXPECTED['decoder']
  assert phases.left() == pytest.approx(3 * (rest - EXPECTED['decoder']))


def test_what_is_not_known_is_not_told(clock, capsys):
  phases = Phases(EXPECTED, estimated=False)
  phases.begin('stage3')
  assert capsys.readouterr().out == '\n== phase 6 of 7: stage3\n'


def test_every_phase_has_an_estimate():
  assert list(EXPECTED) == ['data', *STAGES, 'evaluation']
