"""Reasons are one list, and shares are judged when there is enough to judge."""

import pathlib
import re

import pytest

import qwenvl_jax
from qwenvl_jax.data.record_errors import DROPPED, Counts, ErrorBudget
from qwenvl_jax.errors import ConfigError, DataError


def test_every_reason_has_its_rule():
  raised = re.compile(r"(?:BadRecordError|_broken)\(\s*(?:[^'()]*,\s*)?'(\w+)'")
  found = set()
  for path in pathlib.Path(qwenvl_jax.__file__).parent.rglob('*.py'):
    found |= set(raised.findall(path.read_text(encoding='utf-8')))
  assert {'malformed', 'too_large', 'empty_text', 'missing_image'} <= found
  assert found <= DROPPED.keys()


def counts(seen, dropped):
  made = Counts()
  for number in range(seen):
    made.seen('x')
    if number < dropped:
      made.dropped('x', 'empty_text')
  return made


def test_few_records_are_judged_at_the_end_only():
  limit = ErrorBudget(share=0.1, after=100)
  limit.check(counts(99, 50))
  limit.check(counts(100, 10))
  limit.check(counts(10, 1), at_end=True)
  with pytest.raises(DataError, match='source x: 2 of 10 records.*empty_text'):
    limit.check(counts(10, 2), at_end=True)
  with pytest.raises(DataError, match='11 of 100.*or ask the author'):
    limit.check(counts(100, 11), remedy='ask the author')


@pytest.mark.parametrize('share', [-0.1, 1.5, float('nan'), float('inf')])
def test_a_share_is_from_0_to_1(share):
  with pytest.raises(ConfigError, match='no share'):
    ErrorBudget(share=share)


def test_counts_add_up():
  total = counts(5, 2)
  total.update(counts(3, 1))
  assert total == counts(8, 3) and total != counts(8, 2)
  assert total.kept_of('x') == 5 and total.of('x') == {'empty_text': 3}
