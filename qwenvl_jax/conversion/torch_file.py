"""Where the tensors of a PyTorch file lie, without loading them.

Such files are zip archives with a pickle, which may run code when it is opened;
torch's weights-only unpickler refuses all but tensors. It is asked for tensors
without values, which are then read from their places in the file. The archive
is looked at first: torch would decompress whatever it holds.
"""

import bisect
import warnings
import zipfile
from pathlib import Path

import numpy as np

from qwenvl_jax.conversion.reader import SAFETENSORS_DTYPES, Place
from qwenvl_jax.errors import CheckpointError

_DTYPES = {np.dtype(x).name: x for x in SAFETENSORS_DTYPES.values()}

# Of the pickle and of other small records; the release's has 0.1 MB.
_PICKLE_BYTES = 2**24
_ZIP, _LOCAL_HEADER_BYTES = b'PK\x03\x04', 30


def contents(path: Path) -> dict[str, Place]:
  """Finds every tensor of a file.

  Returns:
    Name to (shape, dtype, place of its first byte).

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
  records = _records(path)
  try:
    with warnings.catch_warnings():  # About bytes that are no pickle of its.
      warnings.simplefilter('ignore')
      state = torch.load(path, map_location='meta', weights_only=True)
  except Exception as error:  # It raises whatever the bytes lead it to.
    reason = str(error).strip().partition('\n')[0][:200]
    raise CheckpointError(
      f'{path} cannot be read as PyTorch weights ({reason}); it is truncated, '
      'damaged, or holds more than tensors'
    ) from error
  if not isinstance(state, dict):
    raise CheckpointError(
      f'{path} holds a {type(state).__name__}, not tensors by name'
    )
  return {
    str(name): _place(path, str(name)[:200], x, torch, records)
    for name, x in state.items()
  }


def _records(path: Path) -> list[tuple[int, int]]:
  """First and last byte + 1 of every record of the archive.

  Raises:
    CheckpointError: it is no archive as torch writes it.
  """
  try:
    if not path.is_file():
      raise OSError('it is not a regular file')
    with path.open('rb') as file:
      if file.read(4) != _ZIP:
        raise CheckpointError(
          f'{path}: its tensors cannot be read in place: it was saved before '
          'torch 1.6, or is damaged. Load it with PyTorch and save it again'
        )
      records = []
      with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
      for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
          raise OSError(f'its record {info.filename[:80]!r} is compressed')
        if info.filename.endswith('.pkl') and info.file_size > _PICKLE_BYTES:
          raise OSError(f'its pickle has {info.file_size:,} bytes')
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        names = int.from_bytes(header[26:28], 'little')
        extra = int.from_bytes(header[28:30], 'little')
        start = info.header_offset + len(header) + names + extra
        records.append((start, start + info.file_size))
      end = file.seek(0, 2)
  except (
    OSError,
    zipfile.BadZipFile,
    ValueError,
    NotImplementedError,
  ) as error:
    raise CheckpointError(
      f'{path} cannot be read as PyTorch weights ({error}); it is truncated, '
      'damaged, or holds more than tensors'
    ) from error
  records.sort()
  if any(a[1] > b[0] for a, b in zip(records, [*records[1:], (end, end)])):
    raise CheckpointError(
      f'{path} cannot be read as PyTorch weights (its records overlap); it is '
      'damaged'
    )
  return records


def _place(path, name, tensor, torch, records) -> Place:
  if not isinstance(tensor, torch.Tensor):
    inside = isinstance(tensor, dict)
    raise CheckpointError(
      f'{path}: {name} is a {type(tensor).__name__}, not a tensor'
      + ('; save only what is in it, if those are the weights' * inside)
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
  end = offset + tensor.numel() * dtype.itemsize
  record = bisect.bisect(records, (start, 2**63)) - 1
  if record < 0 or offset < start or end > records[record][1]:
    raise CheckpointError(
      f'{path}: tensor {name} goes beyond its record in the file; the file is '
      'damaged'
    )
  return tuple(tensor.shape), dtype, offset
