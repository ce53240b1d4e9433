import pytest

from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.train.data_shard import DataShard, find_data_shard, shard_of


def all_readers(held):
  found = [shard_of(process, held) for process in held]
  return [(r.index, r.count, r.first) for r in found]


def test_each_process_reads_a_part():
  held = {0: {0, 4}, 1: {8, 12}}
  assert all_readers(held) == [(0, 2, True), (1, 2, True)]


def test_processes_of_one_tensor_axis_read_the_same():
  held = {0: {0}, 1: {0}, 2: {8}, 3: {8}}
  assert all_readers(held) == [
    (0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False)
  ]  # fmt: skip


def test_parts_need_not_be_contiguous():
  held = {0: {4, 12}, 1: {0, 8}}
  assert all_readers(held) == [(1, 2, True), (0, 2, True)]


@pytest.mark.parametrize('held', [{0: {0, 4}, 1: {4, 8}}, {0: {0, 4}, 1: {8}}])
def test_what_cannot_be_divided_is_refused(held):
  with pytest.raises(ValueError, match='share some of their rows'):
    shard_of(0, held)


def test_one_process_reads_everything():
  assert find_data_shard(make_mesh(), 8) == DataShard(0, 1, True)
