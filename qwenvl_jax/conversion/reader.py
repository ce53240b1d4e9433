"""Lazy reading of released checkpoint folders.

Both kinds of shards are read: safetensors and torch's `.bin`, each alone or
with an index. Only headers are read at first; values come a range of rows at a
time, by plain reads rather than a memory map, whose pages would count as ours.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.errors import CheckpointError

_SAFETENSORS_DTYPES = {
  'BF16': ml_dtypes.bfloat16,
  'F16': np.float16,
  'F32': np.float32,
  'F64': np.float64,
  'I32': np.int32,
  'I64': np.int64,
  'U8': np.uint8,
}

# Single files and indices, in the order they are looked for.
_INDICES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
_SINGLES = ('model.safetensors', 'pytorch_model.bin')


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a checkpoint: what it is, and how to get it.

  Attributes:
    shape: of the tensor.
    dtype: of the tensor.
    file: where it is stored, for messages.
    read: (start, stop) to these rows, a C-ordered array of its own. Tensors
      without axes have one row.
    stored: where the values are in the file as they are; None where reading
      computes them.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path
  read: Callable[[int, int], np.ndarray]
  stored: 'Stored | None' = None

  def read_into(self, start: int, rows: np.ndarray) -> None:
    """Fills `rows` [n,*shape[1:]], each contiguous, from row `start` on.

    Raises:
      CheckpointError: the file is damaged.
    """
    if self.stored is None:
      rows[...] = self.read(start, start + len(rows))
    else:
      self.stored.read_into(start, rows)

  def load(self) -> np.ndarray:
    """The whole tensor."""
    rows = self.read(0, self.shape[0] if self.shape else 1)
    return rows.reshape(self.shape)


def read_json(path: Path) -> dict:
  """Parses a JSON file that holds an object.

  Raises:
    CheckpointError: the file is absent or not JSON.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise CheckpointError(
      f'{path} does not exist: is this the whole checkpoint folder?'
    ) from error
  except OSError as error:
    raise CheckpointError(f'{path} cannot be read ({error})') from error
  except ValueError as error:
    raise CheckpointError(f'{path} is not valid JSON ({error})') from error
  if not isinstance(content, dict):
    raise CheckpointError(f'{path} does not hold a JSON object')
  return content


def has_released_weights(folder: Path) -> bool:
  """Whether a folder holds weights in a released layout."""
  return any((folder / name).exists() for name in _INDICES + _SINGLES)


def open_released(folder: Path) -> dict[str, Tensor]:
  """Opens all tensors of a released checkpoint.

  Args:
    folder: holds `model.safetensors`, `pytorch_model.bin`, or shards of either
      with their index.

  Returns:
    Released name to `Tensor`.

  Raises:
    CheckpointError: no weights, a missing or damaged shard, a tensor in two
      shards, or an index that disagrees with the shards.
  """
  for name in _INDICES:
    if (folder / name).exists():
      return _open_index(folder / name)
  for name in _SINGLES:
    if (folder / name).exists():
      return open_file(folder / name)
  raise CheckpointError(
    f'{folder} holds no weights: expected one of '
    + ', '.join(_SINGLES + _INDICES)
  )


def open_file(path: Path) -> dict[str, Tensor]:
  """Opens all tensors of one safetensors or torch file."""
  if path.suffix == '.safetensors':
    return _open_safetensors(path)
  if buckets.in_bucket(path):
    raise CheckpointError(
      f'{path}: PyTorch reads .bin files from a disk only; copy the folder '
      f'there first: gcloud storage cp -r {path.parent} .'
    )
  from qwenvl_jax.conversion import torch_file

  return {
    name: Stored(path, name, offset, shape, dtype).tensor()
    for name, (shape, dtype, offset) in torch_file.contents(path).items()
  }


def _open_index(index: Path) -> dict[str, Tensor]:
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict):
    raise CheckpointError(f'{index} has no "weight_map"')
  tensors = {}
  for file in sorted(set(weight_map.values())):
    path = index.parent / file
    if not path.exists():
      raise CheckpointError(
        f'{path} is missing, but {index.name} lists it: download that shard '
        'again'
      )
    for name, tensor in open_file(path).items():
      if name in tensors:
        raise CheckpointError(
          f'tensor {name} stands in {tensors[name].file.name} and in {file} '
          f'of {index.parent}'
        )
      tensors[name] = tensor
  for name, file in weight_map.items():
    if name not in tensors or tensors[name].file.name != file:
      raise CheckpointError(
        f'{index} says that {file} holds {name}, but it does not'
      )
  return tensors


def _open_safetensors(path: Path) -> dict[str, Tensor]:
  size = buckets.size(path)
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
      raise CheckpointError(_truncated(path, size))
    header = _parse_header(path, file.read(length))
  header.pop('__metadata__', None)
  start = 8 + length
  tensors = {}
  for name, entry in header.items():
    try:
      kind, shape = entry['dtype'], tuple(entry['shape'])
      first, last = entry['data_offsets']
    except (KeyError, TypeError, ValueError) as error:
      raise CheckpointError(
        f'{path} is not a safetensors file (entry of {name}: {error!r})'
      ) from error
    if kind not in _SAFETENSORS_DTYPES:
      raise CheckpointError(
        f'{path}: tensor {name} has dtype {kind}, which is not supported '
        f'({", ".join(_SAFETENSORS_DTYPES)})'
      )
    dtype = np.dtype(_SAFETENSORS_DTYPES[kind])
    if start + last > size:
      raise CheckpointError(_truncated(path, size, name))
    if last - first != math.prod(shape) * dtype.itemsize:
      raise CheckpointError(
        f'{path}: tensor {name} has {last - first} bytes, not what its shape '
        f'{list(shape)} needs; the file is damaged'
      )
    stored = Stored(path, name, start + first, shape, dtype)
    tensors[name] = stored.tensor()
  return tensors


def _parse_header(path: Path, text: bytes) -> dict:
  def unique(pairs):
    names = [name for name, _ in pairs]
    for name in set(names):
      names.remove(name)
    if names:
      raise CheckpointError(f'{path}: tensor {names[0]} stands in it twice')
    return dict(pairs)

  try:
    header = json.loads(text, object_pairs_hook=unique)
  except ValueError as error:
    raise CheckpointError(
      f'{path} is not a safetensors file ({error})'
    ) from error
  if not isinstance(header, dict):
    raise CheckpointError(f'{path} is not a safetensors file')
  return header


@dataclasses.dataclass(frozen=True)
class Stored:
  """Values that are in a file as they are, C-ordered.

  Attributes:
    file: the file.
    name: of the tensor, for messages.
    offset: of its first byte.
    shape: of the tensor.
    dtype: of the tensor.
  """

  file: Path
  name: str
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def tensor(self) -> Tensor:
    return Tensor(self.shape, self.dtype, self.file, self.read, self)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Rows `start` to `stop`."""
    rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
    self.read_into(start, rows)
    return rows

  def read_into(self, start: int, rows: np.ndarray) -> None:
    """Fills `rows` [n,*shape[1:]], each contiguous, from row `start` on."""
    row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
    try:
      count = buckets.read_into(
        self.file, self.offset + start * row_bytes, rows
      )
    except OSError as error:
      raise CheckpointError(
        f'{self.file}: tensor {self.name} cannot be read ({error})'
      ) from error
    if count != rows.nbytes:
      raise CheckpointError(
        _truncated(self.file, buckets.size(self.file), self.name)
      )


def _truncated(path: Path, size: int, name: str | None = None) -> str:
  at = f' (tensor {name} ends beyond it)' if name else ''
  return f'{path} is truncated at {size:,} bytes{at}: download that file again'
