"""Where the tensors of a PyTorch file lie, without loading them.

Such files are pickles, which may run code when they are opened; torch's
weights-only unpickler refuses all but tensors. It is asked for tensors without
values, which are then read from their places in the file.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

from qwenvl_jax.errors import CheckpointError

_DTYPES = {
  'bfloat16': ml_dtypes.bfloat16,
  'float16': np.float16,
  'float32': np.float32,
  'float64': np.float64,
  'int32': np.int32,
  'int64': np.int64,
  'uint8': np.uint8,
}


def contents(
  path: Path,
) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
  """Name to (shape, dtype, place of its first byte) of every tensor.

  Raises:
    CheckpointError: torch is not installed, the file is damaged or holds more
      than tensors, or a dtype is not supported.
  """
  try:
    import torch
  except ImportError as error:
    raise CheckpointError(
      f'{path} is a PyTorch file; reading it needs torch: pip install '
      "'qwenvl_jax[torch]', or use a safetensors copy of the checkpoint"
    ) from error
  try:
    state = torch.load(path, map_location='meta', weights_only=True)
  except Exception as error:  # It raises whatever the bytes lead it to.
    reason = str(error).strip().partition('\n')[0]
    raise CheckpointError(
      f'{path} cannot be read as PyTorch weights ({reason}); it is truncated, '
      'damaged, or holds more than tensors'
    ) from error
  if not isinstance(state, dict):
    raise CheckpointError(
      f'{path} holds a {type(state).__name__}, not tensors by name'
    )
  return {name: _place(path, name, x, torch) for name, x in state.items()}


def _place(path, name, tensor, torch):
  if not isinstance(tensor, torch.Tensor):
    raise CheckpointError(
      f'{path}: {name} is a {type(tensor).__name__}, not a tensor'
    )
  kind = str(tensor.dtype).removeprefix('torch.')
  if kind not in _DTYPES:
    raise CheckpointError(
      f'{path}: tensor {name} has dtype {kind}, which is not supported '
      f'({", ".join(_DTYPES)})'
    )
  dtype = np.dtype(_DTYPES[kind])
  # Set by torch.load for storages that it leaves in the file.
  start = getattr(tensor.untyped_storage(), '_checkpoint_offset', None)
  if start is None or not tensor.is_contiguous():
    raise CheckpointError(
      f'{path}: tensor {name} cannot be read in place. Load the file with '
      'PyTorch, make its tensors contiguous, and save it again'
    )
  offset = start + tensor.storage_offset() * dtype.itemsize
  return tuple(tensor.shape), dtype, offset
