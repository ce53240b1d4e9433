"""Which rows of every batch each process reads.

The mesh decides: processes whose devices hold the same rows (a layer's work may
be split over them) must read the same ones, and no two others may share any.
"""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.sharding import batch_sharding


class Data(Protocol):
  """Where batches come from.

  Attributes:
    batch_size: rows of the global batch.
  """

  batch_size: int

  def iterator(self, process_index: int, process_count: int) -> Any:
    """One part of every batch, in rows: dict name -> NumPy [b,...].

    Which part a process reads, and of how many, `find_data_shard` says.

    The iterator has `get_state` and `set_state` (a Grain `DatasetIterator`, or
    one whose state is bytes).
    """


@dataclasses.dataclass(frozen=True)
class DataShard:
  """The part of the data that a process reads.

  Attributes:
    index: of the part.
    count: of the parts; each batch is divided among them.
    first: whether this is the first of the processes that read this part. It
      saves the part's state and counts its records.
  """

  index: int = 0
  count: int = 1
  first: bool = True


def find_data_shard(mesh: Mesh, rows: int) -> DataShard:
  """What this process reads.

  Raises:
    ConfigError: the mesh lets processes share some of their rows.
  """
  held = {}
  places = batch_sharding(mesh).devices_indices_map((rows,))
  for device, (part,) in places.items():
    held.setdefault(device.process_index, set()).add(part.start or 0)
  try:
    return shard_of(jax.process_index(), held)
  except ValueError as error:
    raise ConfigError(
      f'the mesh {dict(mesh.shape)} splits the batch so that {error}: let '
      f'data * fsdp be a multiple or a divisor of the {len(held)} processes'
    ) from None


def shard_of(process: int, held: Mapping[int, Set[int]]) -> DataShard:
  """What a process reads.

  Args:
    held: the first rows of the pieces of a batch that each process holds.

  Raises:
    ValueError: processes share some of their rows, but not all.
  """
  parts = sorted({tuple(sorted(starts)) for starts in held.values()})
  starts = [start for part in parts for start in part]
  if len(set(starts)) < len(starts) or len({len(x) for x in parts}) > 1:
    raise ValueError('processes share some of their rows and not others')
  mine = tuple(sorted(held[process]))
  same = [p for p, x in held.items() if tuple(sorted(x)) == mine]
  return DataShard(parts.index(mine), len(parts), process == min(same))
