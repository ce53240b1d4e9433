"""Lazy, memory-mapped reading of released checkpoint folders.

Both kinds of shards are read: safetensors and torch's `.bin`, each alone or
with an index. Nothing is read before it is asked for.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

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
  """One tensor of a checkpoint: what it is, and how to get it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path
  load: Callable[[], np.ndarray]


def read_json(path: Path) -> dict:
  """Parses a JSON file.

  Raises:
    CheckpointError: the file is absent or not JSON.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise CheckpointError(
      f'{path} does not exist: is this the whole checkpoint folder?'
    ) from error
  except (ValueError, UnicodeDecodeError) as error:
    raise CheckpointError(f'{path} is not valid JSON ({error})') from error


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
  return _open_torch(path)


def _open_index(index: Path) -> dict[str, Tensor]:
  try:
    weight_map = read_json(index)['weight_map']
  except (KeyError, TypeError) as error:
    raise CheckpointError(f'{index} has no "weight_map"') from error
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
    if name not in tensors:
      raise CheckpointError(
        f'{index} says that {file} holds {name}, but it does not'
      )
  return tensors


def _open_safetensors(path: Path) -> dict[str, Tensor]:
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or length > size - 8:
      raise CheckpointError(_truncated(path, size))
    try:
      header = json.loads(file.read(length))
    except ValueError as error:
      raise CheckpointError(
        f'{path} is not a safetensors file ({error})'
      ) from error
  header.pop('__metadata__', None)
  start = 8 + length
  tensors = {}
  for name, entry in header.items():
    dtype, shape = entry['dtype'], tuple(entry['shape'])
    if dtype not in _SAFETENSORS_DTYPES:
      raise CheckpointError(
        f'{path}: tensor {name} has dtype {dtype}, which is not supported '
        f'({", ".join(_SAFETENSORS_DTYPES)})'
      )
    dtype = np.dtype(_SAFETENSORS_DTYPES[dtype])
    first, last = entry['data_offsets']
    if start + last > size:
      raise CheckpointError(_truncated(path, size, name))
    if last - first != math.prod(shape) * dtype.itemsize:
      raise CheckpointError(
        f'{path}: tensor {name} has {last - first} bytes, not what its shape '
        f'{list(shape)} needs; the file is damaged'
      )
    tensors[name] = Tensor(
      shape, dtype, path, _mapped(path, dtype, start + first, shape)
    )
  return tensors


def _mapped(path, dtype, offset, shape):
  def load():
    if not math.prod(shape):
      return np.zeros(shape, dtype)
    return np.memmap(path, dtype, 'r', offset, shape)

  return load


def _truncated(path: Path, size: int, name: str | None = None) -> str:
  at = f' (tensor {name} ends beyond it)' if name else ''
  return f'{path} is truncated at {size:,} bytes{at}: download that file again'


def _open_torch(path: Path) -> dict[str, Tensor]:
  try:
    import torch
  except ImportError as error:
    raise CheckpointError(
      f'{path} is a PyTorch file; reading it needs torch: pip install '
      "'qwenvl_jax[torch]', or use a safetensors copy of the checkpoint"
    ) from error
  try:
    # A pickle from strangers: weights only, never code.
    state = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
  except Exception as error:
    raise CheckpointError(
      f'{path} cannot be read as PyTorch weights ({error}); it is truncated, '
      'damaged, or holds more than tensors'
    ) from error

  def loader(tensor):
    def load():
      if tensor.dtype == torch.bfloat16:
        bits = tensor.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
      return tensor.contiguous().numpy()

    return load

  tensors = {}
  for name, tensor in state.items():
    dtype = str(tensor.dtype).removeprefix('torch.')
    dtype = ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype
    tensors[name] = Tensor(
      tuple(tensor.shape), np.dtype(dtype), path, loader(tensor)
    )
  return tensors
