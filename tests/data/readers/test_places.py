import os
import pickle

import downloads
import pytest

from qwenvl_jax.data.readers.places import Refer, load_pickle
from qwenvl_jax.errors import DataError


class _Evil:
  def __reduce__(self):
    return os.mkdir, ('owned',)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  file = tmp_path / 'refs.p'
  file.write_bytes(pickle.dumps([_Evil()]))
  with pytest.raises(DataError, match='refs.p is not a pickle of plain data'):
    load_pickle(file)
  assert not (tmp_path / 'owned').exists()
  file.write_bytes(pickle.dumps([{'a': 1.5}])[:-4])
  with pytest.raises(DataError, match='download it again'):
    load_pickle(file)


def test_splits_do_not_mix(tmp_path):
  downloads.refcoco(tmp_path)
  (found,) = Refer('testA').records(tmp_path)
  assert found.id == 'testA/581857' and found.size == (40, 30)
  assert [x.phrase for x in found.regions] == ['lady in blue']
