"""Writes parameters in the released layout: safetensors shards and an index."""

import json
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

_INDEX = 'model.safetensors.index.json'


def write_released(
  folder: Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int = 2 * 1024**3,
) -> list[Path]:
  """Writes tensors into shards of bounded size.

  Args:
    folder: gets the shards, and the index if there is more than one.
    tensors: (released name, array), consumed one at a time.
    shard_bytes: upper bound on a shard, unless one tensor is larger.

  Returns:
    The shards. A single one is called `model.safetensors`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  shards, weight_map, pending, size = [], {}, {}, 0

  def flush():
    path = folder / f'pending-{len(shards) + 1:05d}.safetensors'
    save_file(pending, path, metadata={'format': 'pt'})
    shards.append(path)
    pending.clear()

  total = 0
  for name, array in tensors:
    if pending and size + array.nbytes > shard_bytes:
      flush()
      size = 0
    pending[name] = array
    weight_map[name] = len(shards)
    size += array.nbytes
    total += array.nbytes
  flush()
  names = (
    ['model.safetensors']
    if len(shards) == 1
    else [
      f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
      for i in range(len(shards))
    ]
  )
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': total},
      'weight_map': {name: names[i] for name, i in weight_map.items()},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + '\n')
  return [
    path.rename(folder / name) for path, name in zip(shards, names, strict=True)
  ]


def narrow(name: str, array: np.ndarray, dtype) -> np.ndarray:
  """Casts to a released dtype, refusing values that do not fit.

  Raises:
    OverflowError: a finite value became infinite (float16).
  """
  with np.errstate(over='ignore'):  # Reported below, by name.
    result = array.astype(dtype)
  if np.dtype(dtype) == np.float16:
    finite = np.isfinite(array.astype(np.float32))
    if not np.isfinite(result[finite]).all():
      raise OverflowError(
        f'{name} has values beyond float16 (65504): choose bfloat16'
      )
  return result


DTYPES = {
  'bfloat16': ml_dtypes.bfloat16,
  'float16': np.float16,
  'float32': np.float32,
}
