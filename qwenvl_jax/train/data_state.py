"""Saves the state of the data with a step, for any number of shards.

The state of each shard (`DataShard`; as many as processes, or fewer) is a file.
A run that goes on with as many shards reads its own; with another number, every
process reads all files and the iterator merges them (`Batches.merge`).
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from qwenvl_jax.data.batches import Batches
from qwenvl_jax.train.data_shard import DataShard

_FILE = re.compile(r'process_(\d+)-of-(\d+)\.json')


class DataStateHandler(ocp.CheckpointHandler):
  """Writes and reads the states of iterators."""

  def save(self, directory: Path, args: 'DataState') -> None:
    """Writes the state of this process's shard."""
    if not args.shard.first:
      return
    state = args.item.get_state()
    text = state.decode() if isinstance(state, bytes) else json.dumps(state)
    _file(directory, args.shard).write_text(text)

  def restore(self, directory: Path, args: 'DataState') -> Any:
    """Sets the iterator to the state saved in a folder.

    Raises:
      ValueError: files of some shards are missing.
    """
    files = sorted(
      (int(match[1]), int(match[2]), path)
      for path in directory.iterdir()
      if (match := _FILE.fullmatch(path.name))
    )
    item, shard = args.item, args.shard
    counts = {count for _, count, _ in files}
    if len(counts) != 1 or len(files) != counts.pop():
      raise ValueError(
        f'{directory} holds the states of processes {[x[0] for x in files]}, '
        'some are missing'
      )
    if len(files) == shard.count or not isinstance(item, Batches):
      text = _file(directory, shard).read_text()
      # Of other iterators a state is bytes, or what JSON holds.
      as_bytes = isinstance(item.get_state(), bytes)
      item.set_state(text.encode() if as_bytes else json.loads(text))
      return item
    states = [json.loads(path.read_text()) for _, _, path in files]
    item.set_state(item.merge(states, shard.index))
    return item


def _file(directory: Path, shard: DataShard) -> Path:
  return directory / f'process_{shard.index}-of-{shard.count}.json'


@ocp.args.register_with_handler(
  DataStateHandler, for_save=True, for_restore=True
)
@dataclasses.dataclass
class DataState(ocp.args.CheckpointArgs):
  """What to save or restore: the iterator, and which part it reads."""

  item: Any
  shard: DataShard = DataShard()
