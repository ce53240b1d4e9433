"""What is in a checkpoint folder, from headers alone."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwenvl_jax.conversion import folder as folders
from qwenvl_jax.conversion import gptq, layout, openclip, orbax_store
from qwenvl_jax.conversion.reader import has_released_weights, open_released
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.int4 import PER_WORD

# As the paper's Table 1 calls them.
_PART_NAMES = {
  'vision': 'vision encoder',
  'adapter': 'VL adapter',
  'decoder': 'LLM',
}


@dataclasses.dataclass(frozen=True)
class Part:
  """One row of the report: a part of the model, or all of it."""

  name: str
  tensors: int
  parameters: int
  bytes: int
  dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
  """What `inspect` found.

  Attributes:
    family: 'Qwen-VL-Chat', ...
    layout: how it is stored.
    sizes: one line a part of the model.
    parts: parameters by part of the model as in the paper's Table 1.
    extras: files beside the weights.
    notes: what else there is to say.
    problem: what does not match config.json, None if all is there.
  """

  family: str
  layout: str
  sizes: tuple[str, ...]
  parts: tuple[Part, ...]
  extras: tuple[str, ...]
  notes: tuple[str, ...]
  problem: str | None


def inspect(folder: Path) -> Report:
  """What is in a checkpoint folder, without reading its tensors.

  Args:
    folder: Qwen-VL(-Chat) or its Int4 release, Qwen-7B, OpenCLIP, a checkpoint
      of ours or a training run.

  Raises:
    CheckpointError: it is no checkpoint folder, or damaged.
  """
  config = folders.read_config(folder)
  stored = folders.params_folder(folder)
  notes = []
  if stored is not None:
    form = 'Orbax'
    if stored.parent != folder:
      form += f', training run at step {stored.parent.name}'
    tensors = dict(layout.flatten(orbax_store.metadata(stored)))
    parts = _parts_of(tensors)
    expected = layout.parameter_shapes(config, parts)
    if config.decoder.int4_group is not None:
      form += ', int4 (GPTQ) kept'
      notes.append(
        "the decoder's kernels are packed, 4 bits a weight, with a scale and a "
        f'zero point for each {config.decoder.int4_group} inputs; the table '
        'counts the weights that they stand for'
      )
  elif openclip.is_openclip(folder) and not has_released_weights(folder):
    form, parts, tensors = 'OpenCLIP', ['vision'], openclip.open_vision(folder)
    table = openclip.openclip_rules(config)
    expected = layout.released_shapes(table)
    notes.append(
      'the text tower, the class token and the output projection are left out'
    )
  else:
    tensors = open_released(folder)
    files = {tensor.file for tensor in tensors.values()}
    form = f'released, {len(files)} {min(files).suffix} file(s)'
    if gptq.is_quantized(tensors):
      form += ', int4 (GPTQ)'
      notes.append(
        f'{len(tensors):,} tensors as stored; the table shows the weights that '
        'they stand for'
      )
    parts = _parts_of(tensors)
    expected = layout.released_shapes(layout.rules(config, parts))
  stored_bytes = sum(map(_bytes, tensors.values()))
  if gptq.is_quantized(tensors):
    notes.append(f'{stored_bytes / 1e9:,.2f} GB as stored')
    tensors = gptq.dequantized(folder, tensors, config)
  if set(parts) == {'adapter', 'decoder', 'vision'}:
    family = 'Qwen-VL-Chat' if _is_chat(folder) else 'Qwen-VL'
  elif parts == ['decoder']:
    family = 'Qwen-7B' if config.decoder.layers == 32 else 'Qwen'
  elif form == 'OpenCLIP':
    family = 'OpenCLIP vision transformer'
  else:
    family = f'part of a Qwen-VL ({", ".join(parts)})'
  return Report(
    family,
    form,
    tuple(_size(config, part) for part in parts),
    _table(tensors, parts),
    tuple(path.name for path in folders.side_files(folder)),
    tuple(notes),
    _problem(expected, tensors, folder),
  )


def _parts_of(names) -> list[str]:
  found = {layout.part_of(name) for name in names}
  return [part for part in _PART_NAMES if part in found]


def _is_chat(folder: Path) -> bool:
  try:
    text = folders.side_file(folder, folders.GENERATION).read_text()
    return json.loads(text).get('chat_format') == 'chatml'
  except (OSError, ValueError):
    return False


def _size(config: QwenVLConfig, part: str) -> str:
  v, a, d = config.vision, config.adapter, config.decoder
  return {
    'vision': f'vision encoder: {v.layers} layers, width {v.width}, {v.heads} '
    f'heads, mlp {v.mlp_dim}, patch {v.patch_size}, {v.image_size} px',
    'adapter': f'VL adapter: {a.queries} queries, width {a.dim}, {a.heads} '
    'heads',
    'decoder': f'LLM: {d.layers} layers, width {d.dim}, {d.heads} heads, mlp '
    f'{d.mlp_dim}, vocabulary {d.vocab_size}, length {d.seq_length}',
  }[part]


def _table(tensors: Mapping, parts) -> tuple[Part, ...]:
  groups = {part: [] for part in parts}
  for name in tensors:
    part = parts[0] if len(parts) == 1 else layout.part_of(name)
    groups[part].append(name)
  rows = [
    _row(_PART_NAMES[part], {name: tensors[name] for name in group})
    for part, group in groups.items()
  ]
  return (*rows, _row('total', tensors))


def _row(name: str, group: Mapping) -> Part:
  return Part(
    name,
    len(group),
    sum(_weights(path, tensor) for path, tensor in group.items()),
    sum(map(_bytes, group.values())),
    tuple(sorted({np.dtype(t.dtype).name for t in group.values()})),
  )


def _weights(path: str, tensor) -> int:
  """Parameters that a tensor holds: words hold those of a packed kernel."""
  size = math.prod(tensor.shape)
  if layout.is_packed(path):
    return size * PER_WORD if path.endswith('/words') else 0
  return size


def _bytes(tensor) -> int:
  return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _problem(expected, tensors, folder) -> str | None:
  found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  try:
    layout.check_shapes(expected, found, str(folder))
  except CheckpointError as error:
    return str(error)
  return None
