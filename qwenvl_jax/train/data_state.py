"""Saves the state of the data with a step, for any number of processes.

Each process writes what its part of the run has read. A run that goes on with
as many processes reads its own file; with another number, every process reads
all files and the iterator merges them (`Batches.merge`).
"""

import dataclasses
import json
import re
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

_FILE = re.compile(r'process_(\d+)-of-(\d+)\.json')


class DataStateHandler(grain.checkpoint.CheckpointHandler):
  """As Grain's, and restores with another number of processes."""

  def restore(self, directory, item: Any = None, args: Any = None) -> Any:
    """Sets the iterator to the state saved in a folder.

    Raises:
      ValueError: files of some processes are missing.
    """
    item = item or args.item
    files = sorted(
      (int(match[1]), int(match[2]), path)
      for path in directory.iterdir()
      if (match := _FILE.fullmatch(path.name))
    )
    counts = {count for _, count, _ in files}
    same = counts == {jax.process_count()}
    if same or not hasattr(item, 'merge'):
      return super().restore(directory, item)
    if len(counts) != 1 or len(files) != counts.pop():
      raise ValueError(
        f'{directory} holds the states of processes {[x[0] for x in files]}, '
        'some are missing'
      )
    states = [json.loads(path.read_text()) for _, _, path in files]
    item.set_state(item.merge(states, jax.process_index()))
    return item


@ocp.args.register_with_handler(DataStateHandler, for_save=True)
@dataclasses.dataclass
class SaveDataState(ocp.args.CheckpointArgs):
  """What to save: the iterator."""

  item: Any


@ocp.args.register_with_handler(DataStateHandler, for_restore=True)
@dataclasses.dataclass
class RestoreDataState(ocp.args.CheckpointArgs):
  """What to restore: the iterator."""

  item: Any
