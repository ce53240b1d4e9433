"""A thousand hostile inputs; `benchmarks/fuzz.py` makes a hundred thousand."""

import random

import pytest
from fuzzing import checkpoints, config_values, records, shards

KINDS = checkpoints.KINDS | config_values.KINDS | records.KINDS | shards.KINDS
INPUTS = -(-1000 // len(KINDS))


@pytest.mark.parametrize('kind', KINDS)
def test_hostile_input_is_refused_dropped_or_read(kind, tmp_path):
  for seed in range(INPUTS):
    folder = tmp_path / str(seed)
    folder.mkdir()
    # As benchmarks/fuzz.py makes it, so that a seed means the same there.
    outcome = KINDS[kind](random.Random(f'{kind} {seed}'), folder)
    assert outcome in ('handled', 'dropped', 'accepted'), (kind, seed)
