"""Lazy reading of released checkpoint folders.

Both kinds of shards are read: safetensors and torch's `.bin`, each alone or
with an index. Only headers are read at first; values come a range of rows at a
time, by plain reads rather than a memory map, whose pages would count as ours.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.conversion import json_schema, schemas
from qwenvl_jax.conversion.rules import nbytes
from qwenvl_jax.conversion.tensors import Tensor
from qwenvl_jax.errors import CheckpointError

SAFETENSORS_DTYPES = {
  'BF16': ml_dtypes.bfloat16,
  'F16': np.float16,
  'F32': np.float32,
  'F64': np.float64,
  'I32': np.int32,
  'I64': np.int64,
  'U8': np.uint8,
}

# The format allows 100 MB, the release has 0.1 MB.
_HEADER_BYTES = 2**24

# What numpy and a file can hold.
_MAX_AXES, _MAX_LENGTH = 16, 2**48
_MAX_NAME = 300

# Single files and indices, in the order in which transformers takes them.
_FILES = (
  'model.safetensors',
  'model.safetensors.index.json',
  'pytorch_model.bin',
  'pytorch_model.bin.index.json',
)

# (shape, dtype, place of the first byte)
Place = tuple[tuple[int, ...], np.dtype, int]


def _present(folder: Path) -> list[str]:
  return [name for name in _FILES if (folder / name).exists()]


def has_released_weights(folder: Path) -> bool:
  """Whether a folder holds weights in a released layout."""
  return bool(_present(folder))


def open_released(
  folder: Path, notes: list[str] | None = None
) -> dict[str, Tensor]:
  """Opens all tensors of a released checkpoint.

  Args:
    folder: holds `model.safetensors`, `pytorch_model.bin`, or shards of either
      with their index; of several, what transformers takes.
    notes: gets a line about files beside these that are not read.

  Returns:
    Released name to `Tensor`.

  Raises:
    CheckpointError: no weights, a missing or damaged shard, a tensor in two
      shards, or an index that disagrees with the shards.
  """
  found = _present(folder)
  if not found:
    raise CheckpointError(
      f'{folder} holds no weights: expected one of {", ".join(_FILES)}'
    )
  first, *others = found
  if others and notes is not None:
    notes.append(
      f'{first} is read, as transformers does, and not {", ".join(others)} '
      'beside it: remove what is old'
    )
  if first.endswith('.json'):
    return _open_index(folder / first)
  return open_file(folder / first)


def open_file(path: Path) -> dict[str, Tensor]:
  """Opens all tensors of one safetensors or torch file.

  Raises:
    CheckpointError: it is damaged or holds something else.
  """
  if path.suffix == '.safetensors':
    found = _open_safetensors(path)
  elif buckets.in_bucket(path):
    raise CheckpointError(
      f'{path}: PyTorch reads .bin files from a disk only; copy the folder '
      f'there first: gcloud storage cp -r {path.parent} .'
    )
  else:
    from qwenvl_jax.conversion import torch_file

    found = torch_file.contents(path)
  for name in found:
    _check_name(path, name)
  return {name: _stored(path, name, place) for name, place in found.items()}


def _check_name(path: Path, name: str) -> None:
  if not name.isprintable() or len(name) > _MAX_NAME:
    raise CheckpointError(
      f'{path} holds a tensor that is called {name[:80]!r}: no model has such '
      'a name; the file is damaged'
    )


def _open_index(index: Path) -> dict[str, Tensor]:
  raw = json_schema.read_json(index)
  weight_map = json_schema.check(raw, schemas.INDEX, str(index))['weight_map']
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
    _check_name(index, name)
    if name not in tensors or tensors[name].file.name != file:
      raise CheckpointError(
        f'{index} says that {file} holds {name}, but it does not'
      )
  return tensors


def _open_safetensors(path: Path) -> dict[str, Place]:
  """Reads a header as strictly as the format's own reader does."""
  try:
    size = buckets.size(path)
    length = int.from_bytes(_bytes(path, 0, 8), 'little')
    if size < 8 or length > size - 8:
      raise CheckpointError(_truncated(path, size))
    if length > _HEADER_BYTES:
      raise CheckpointError(
        f'{path} is not a safetensors file (its header has {length:,} bytes, '
        f'more than {_HEADER_BYTES:,})'
      )
    text = _bytes(path, 8, length)
  except OSError as error:
    raise CheckpointError(
      f'{path} cannot be read ({error.strerror or error})'
    ) from error
  header = json_schema.parse(text, f'the header of {path}', 'tensor')
  extra = header.pop('__metadata__', None) if isinstance(header, dict) else 0
  if not isinstance(extra, dict | None) or not all(
    isinstance(value, str) for value in (extra or {}).values()
  ):
    raise CheckpointError(
      f'{path} is not a safetensors file (its header is no object of tensors)'
    )
  places, spans = {}, []
  for name, entry in header.items():
    _check_name(path, name)
    shape, dtype, first, last = _parse_entry(path, name, entry)
    places[name] = shape, dtype, 8 + length + first
    spans.append((first, last, name))
  _check_spans(path, sorted(spans), 8 + length, size)
  return places


def _bytes(path: Path, start: int, length: int) -> bytes:
  content = np.empty(length, np.uint8)
  return content[: buckets.read_into(path, start, content)].tobytes()


def _parse_entry(path: Path, name: str, entry: Any):
  """Shape, dtype and offsets of a tensor."""
  entry = entry if isinstance(entry, dict) else {}
  kind, shape = entry.get('dtype'), entry.get('shape')
  offsets = entry.get('data_offsets')
  for value, least, most in ((shape, 0, _MAX_AXES), (offsets, 2, 2)):
    if (
      not isinstance(value, list)
      or not least <= len(value) <= most
      or not all(type(x) is int and 0 <= x < _MAX_LENGTH for x in value)
    ):
      raise CheckpointError(
        f'{path}: tensor {name} has no shape or offsets that a file can '
        'hold; the file is damaged'
      )
  if not isinstance(kind, str) or kind not in SAFETENSORS_DTYPES:
    raise CheckpointError(
      f'{path}: tensor {name} has dtype {repr(str(kind))[1:81]}, which is not '
      f'supported ({", ".join(SAFETENSORS_DTYPES)})'
    )
  dtype, (first, last) = np.dtype(SAFETENSORS_DTYPES[kind]), offsets
  if last - first != nbytes(shape, dtype):
    raise CheckpointError(
      f'{path}: tensor {name} has {last - first} bytes, not what its '
      f'shape {shape} needs; the file is damaged'
    )
  return tuple(shape), dtype, first, last


def _check_spans(path: Path, spans: list[tuple], start: int, size: int) -> None:
  """Checks that tensors fill a file one after the other."""
  end, before = 0, 'the header'
  for first, last, name in spans:
    if start + last > size:
      raise CheckpointError(_truncated(path, size, name))
    if first != end:
      how = 'overlaps with' if first < end else 'leaves bytes unused after'
      raise CheckpointError(
        f'{path}: tensor {name} {how} {before}; the file is damaged'
      )
    end, before = last, name
  if start + end != size:
    raise CheckpointError(
      f'{path} has {size - start - end:,} bytes that belong to no tensor; the '
      'file is damaged'
    )


def _stored(path: Path, name: str, place: Place) -> Tensor:
  """Gives values that are in a file as they are, C-ordered."""
  shape, dtype, offset = place
  row_bytes = nbytes(shape[1:], dtype)

  def read_into(start, rows):
    try:
      count = buckets.read_into(path, offset + start * row_bytes, rows)
    except OSError as error:
      raise CheckpointError(
        f'{path}: tensor {name} cannot be read ({error})'
      ) from error
    if count != rows.nbytes:
      raise CheckpointError(_truncated(path, buckets.size(path), name))

  return Tensor(shape, dtype, path, read_into, offset)


def _truncated(path: Path, size: int, name: str | None = None) -> str:
  at = f' (tensor {name} ends beyond it)' if name else ''
  return f'{path} is truncated at {size:,} bytes{at}: download that file again'
