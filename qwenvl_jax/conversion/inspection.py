"""What is in a checkpoint folder: from headers, and how many values are bad."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from qwenvl_jax.conversion import checkpoint_io, finite, gptq, layout
from qwenvl_jax.conversion.blocks import plan
from qwenvl_jax.conversion.convert import Progress, copy
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.rules import nbytes
from qwenvl_jax.errors import CheckpointError, QwenVLError
from qwenvl_jax.model.config import QwenVLConfig

# As the paper's Table 1 calls them, in its order.
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
    problems: what does not match config.json, what is wrong beside the weights,
      and values that are not finite.
  """

  family: str
  layout: str
  sizes: tuple[str, ...]
  parts: tuple[Part, ...]
  extras: tuple[str, ...]
  notes: tuple[str, ...]
  problems: tuple[str, ...]


def inspect(
  folder: Path,
  progress: Progress = lambda done, total: None,
  values: bool = False,
) -> Report:
  """Reports what is in a checkpoint folder.

  Args:
    folder: Qwen-VL(-Chat) or its Int4 release, Qwen-7B, OpenCLIP, a checkpoint
      of ours or a training run.
    progress: see `convert.Progress`.
    values: whether to read all values, a block at a time, and count those that
      are not finite; else headers alone are read.

  Raises:
    CheckpointError: it is no checkpoint folder, or damaged.
  """
  config = checkpoint_io.read_config(folder)
  found = checkpoint_io.look_into(folder, config)
  parts = [part for part in _PART_NAMES if part in found.parts]
  if found.orbax is not None:
    expected = layout.parameter_shapes(config, parts)
  else:
    expected = layout.released_shapes(found.table)
  problem = _problem(expected, found.tensors, folder)
  problems = [problem, _assets_problem(folder, config)]
  if values and problem is None:
    problems.append(_not_finite(folder, config, progress))
  return Report(
    _family(folder, config, parts, found.form),
    found.form,
    tuple(_size(config, part) for part in parts),
    _table(found.tensors, parts),
    tuple(_printable(path.name) for path in assets.assets(folder)),
    (*_notes(found, config), *found.notes),
    tuple(filter(None, problems)),
  )


def origin(folder: Path, adapter: str | Path | None = None) -> str:
  """Says which folder a model was opened from, and in which layout it is."""
  orbax = checkpoint_io.params_folder(folder)
  if orbax is None:
    form = 'released layout'
  elif orbax.parent == folder:
    form = 'converted'
  else:
    form = f'run at step {orbax.parent.name}'
  return f'{folder} ({form})' + (f' with {adapter}' if adapter else '')


def in_short(
  config: QwenVLConfig, params: Mapping, adapters: Iterable[str] = ()
) -> str:
  """Says in one line how large an opened model is, and where.

  Args:
    config: its sizes and dtype.
    params: nested dict of its arrays.
    adapters: their names.
  """
  bits = ''
  if config.decoder.int8 or config.decoder.int4_group is not None:
    bits = f', kernels of {8 if config.decoder.int8 else 4} bits'
  arrays = jax.tree.leaves(params)
  placed = [x.devices() for x in arrays if isinstance(x, jax.Array)]
  devices = set().union(*placed)
  kinds = ' and '.join(sorted({device.device_kind for device in devices}))
  dtype = np.dtype(config.dtype).name
  where = f'{len(devices)} x {kinds}' if devices else 'the host'
  named = f'adapters {", ".join(adapters)}, ' if adapters else ''
  return (
    f'{rounded(count(params))} parameters, {dtype}{bits}, '
    f'pictures of {config.vision.image_size} px as {config.adapter.queries} '
    f'tokens, {named}on {where}'
  )


def count(params: Mapping) -> int:
  """Counts the weights of a nested dict of arrays."""
  arrays = layout.flatten(params)
  return sum(layout.weights(path, x.shape) for path, x in arrays)


def rounded(number: int) -> str:
  """Writes a number to three figures: 873K, 1.23M, 9.66B."""
  for unit, name in ((1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
    if number >= unit:
      return f'{number / unit:.3g}{name}'
  return str(number)


def _printable(name: str) -> str:
  return name if name.isprintable() else repr(name)


def _notes(found: checkpoint_io.Contents, config: QwenVLConfig):
  if found.orbax is not None and config.decoder.int4_group is not None:
    yield (
      "the decoder's kernels are packed, 4 bits a weight, with a scale and a "
      f'zero point for each {config.decoder.int4_group} inputs; the table '
      'counts the weights that they stand for'
    )
  if found.form == 'OpenCLIP':
    yield (
      'the text tower, the class token and the output projection are left out'
    )
  if gptq.is_quantized(found.stored):
    yield (
      f'{len(found.stored):,} tensors as stored; the table shows the weights '
      'that they stand for'
    )
    size = sum(nbytes(x.shape, x.dtype) for x in found.stored.values())
    yield f'{size / 1e9:,.2f} GB as stored'


def _family(folder: Path, config: QwenVLConfig, parts, form: str) -> str:
  if set(parts) == set(_PART_NAMES):
    try:
      return 'Qwen-VL-Chat' if assets.is_chat(folder) else 'Qwen-VL'
    except CheckpointError:  # Among the problems.
      return 'Qwen-VL'
  if parts == ['decoder']:
    return 'Qwen-7B' if config.decoder.layers == 32 else 'Qwen'
  if form == 'OpenCLIP':
    return 'OpenCLIP vision transformer'
  return f'part of a Qwen-VL ({", ".join(parts)})'


def _assets_problem(folder: Path, config: QwenVLConfig) -> str | None:
  try:
    assets.is_chat(folder)
    assets.read_tokenizer(folder, config)
  except QwenVLError as error:
    return str(error)
  return None


def _not_finite(folder: Path, config: QwenVLConfig, progress) -> str | None:
  tensors, table = checkpoint_io.open_tensors(folder, config)
  counts = copy(tensors, plan(table), lambda block, rows: None, progress)
  return finite.describe(counts)


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
    sum(layout.weights(path, x.shape) for path, x in group.items()),
    sum(nbytes(x.shape, x.dtype) for x in group.values()),
    tuple(sorted({np.dtype(t.dtype).name for t in group.values()})),
  )


def _problem(expected, tensors, folder) -> str | None:
  found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  try:
    layout.check_shapes(expected, found, str(folder))
  except CheckpointError as error:
    return str(error)
  return None
