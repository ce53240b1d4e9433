"""Writes the released layout: safetensors shards and an index, in any order.

Headers come from names and shapes alone, so that every block of a tensor can be
written to its place as soon as it is there.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwenvl_jax.conversion.reader import SAFETENSORS_DTYPES
from qwenvl_jax.conversion.rules import nbytes

_INDEX = 'model.safetensors.index.json'

_NAMES = {np.dtype(x): name for name, x in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor is written."""

  file: str
  offset: int
  row_bytes: int


class ReleasedWriter:
  """Shards of bounded size, written block by block."""

  def __init__(
    self,
    folder: Path,
    tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]],
    shard_bytes: int,
  ):
    """Makes all files, with room for the values.

    Args:
      folder: gets the shards, and the index if there is more than one; a single
        shard is called `model.safetensors`.
      tensors: (released name, shape, dtype) in the order to be stored.
      shard_bytes: upper bound on the tensors of a shard, unless one tensor is
        larger.
    """
    shards = _split(tensors, shard_bytes)
    names = ['model.safetensors']
    if len(shards) > 1:
      names = [
        f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
        for i in range(len(shards))
      ]
    self._places, self._files = {}, {}
    for file, shard in zip(names, shards, strict=True):
      self._make(folder / file, shard)
    if len(shards) > 1:
      index = {
        'metadata': {'total_size': sum(nbytes(*t[1:]) for t in tensors)},
        'weight_map': {name: p.file for name, p in self._places.items()},
      }
      text = json.dumps(index, indent=2) + '\n'
      (folder / _INDEX).write_text(text, encoding='utf-8')

  def _make(self, path: Path, shard):
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, shape, dtype in shard:
      begin, end = end, end + nbytes(shape, dtype)
      header[name] = {
        'dtype': _NAMES[np.dtype(dtype)],
        'shape': list(shape),
        'data_offsets': [begin, end],
      }
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # Values start at a multiple of 8.
    for name, shape, dtype in shard:
      begin = header[name]['data_offsets'][0]
      row = nbytes(shape[1:], dtype)
      self._places[name] = Place(path.name, 8 + len(text) + begin, row)
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    self._files[path.name] = file
    os.pwrite(file, len(text).to_bytes(8, 'little') + text, 0)
    os.ftruncate(file, 8 + len(text) + end)

  def write(self, name: str, start: int, rows: np.ndarray) -> None:
    """Writes rows of a tensor, from row `start` on; several threads may.

    Args:
      name: of the tensor.
      start: the first of the rows.
      rows: [n, ...], C-ordered.
    """
    place = self._places[name]
    data = memoryview(rows.reshape(-1).view(np.uint8))
    offset = place.offset + start * place.row_bytes
    while data:  # One write is at most 2 GiB, and may be cut short.
      done = os.pwrite(self._files[place.file], data, offset)
      data, offset = data[done:], offset + done

  def close(self) -> None:
    for file in self._files.values():
      os.close(file)
    self._files = {}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def _split(tensors, shard_bytes):
  shards, size = [[]], 0
  for tensor in tensors:
    if shards[-1] and size + nbytes(*tensor[1:]) > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += nbytes(*tensor[1:])
  return shards
