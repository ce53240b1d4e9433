import json

import pytest

from qwenvl_jax.data.batches import Batches
from qwenvl_jax.train.data_state import DataState, DataStateHandler


def _state(process, count):
  return {
    'row': 64,
    'shards': {str(x): [[x, x, []]] for x in range(process, 4, count)},
    'counts': {'a/seen': 10},
    'tokens': [3, 4],
  }


def _saved(folder, count):
  for process in range(count):
    file = folder / f'process_{process}-of-{count}.json'
    file.write_text(json.dumps(_state(process, count)))


def _restored(folder):
  iterator = Batches(lambda state: iter(()), 8)
  DataStateHandler().restore(folder, DataState(iterator))
  return iterator.get_state()


def test_restores_what_other_numbers_of_processes_saved(tmp_path):
  _saved(tmp_path, 2)
  assert _restored(tmp_path) == {
    'row': 64,
    'shards': {str(x): [[x, x, []]] for x in range(4)},
    'counts': {'a/seen': 20},
    'tokens': [6, 8],
  }


def test_its_own_file_where_the_number_is_the_same(tmp_path):
  _saved(tmp_path, 1)
  assert _restored(tmp_path) == _state(0, 1)


def test_missing_files_are_no_state(tmp_path):
  _saved(tmp_path, 3)
  (tmp_path / 'process_1-of-3.json').unlink()
  with pytest.raises(ValueError, match=r'\[0, 2\]'):
    _restored(tmp_path)
