"""Checkpoint folders: the released layout, ours, and a training run.

Ours keeps the released files beside the weights and has Orbax parameters:

  config.json  generation_config.json  qwen.tiktoken  params/

A training run has the same files at its root and `checkpoints/STEP/params/`;
opening it means its newest complete step. Of OpenCLIP's folders the vision
transformer is read, of Qwen-7B's the decoder.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.conversion import gptq, layout, orbax_store, rounding
from qwenvl_jax.conversion.atomic import UNFINISHED
from qwenvl_jax.conversion.blocks import plan
from qwenvl_jax.conversion.families import openclip
from qwenvl_jax.conversion.families.names import RELEASED, TensorNames
from qwenvl_jax.conversion.families.qwen_vl.assets import find_asset
from qwenvl_jax.conversion.families.qwen_vl.config import config_from_hf
from qwenvl_jax.conversion.json_schema import read_json
from qwenvl_jax.conversion.loader import BUCKET_THREADS, THREADS, to_devices
from qwenvl_jax.conversion.reader import has_released_weights, open_released
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.conversion.tensors import (
  Tensor,
  cast_all,
  check_dtypes,
  check_tensors,
)
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig

# Of a training run: where its steps are, and Orbax's mark of a complete one if
# that is in a bucket.
CHECKPOINTS = 'checkpoints'
COMPLETE = 'commit_success.txt'


def params_folder(folder: Path, item: str = 'params') -> Path | None:
  """Finds the Orbax parameters under a folder of ours, None if it is not ours.

  Args:
    folder: a checkpoint, or a training run.
    item: what a step calls them.

  Raises:
    CheckpointError: a training run without a complete checkpoint.
  """
  if (folder / item).is_dir():
    return folder / item
  steps = folder / CHECKPOINTS
  if not steps.is_dir():
    return None
  complete = [
    int(path.name)
    for path in steps.iterdir()
    if path.name.isdecimal() and _complete(path, item)
  ]
  if not complete and item == 'params' and _adapts(steps):
    raise CheckpointError(
      f'{folder} is a run with low-rank factors and holds no whole model: name '
      'it as the adapter of its base, or join both with qwenvl-convert '
      'merge-adapter'
    )
  if not complete:
    raise CheckpointError(
      f'{steps} holds no complete checkpoint yet: let the run save one first'
    )
  return steps / str(max(complete)) / item


def _adapts(steps: Path) -> bool:
  return any(steps.glob('*/trained'))


def _complete(step: Path, item: str) -> bool:
  """Whether Orbax has finished a step; in a bucket it says so in the end."""
  if buckets.in_bucket(step) and not (step / COMPLETE).exists():
    return False
  return (step / item).is_dir()


def read_config(
  folder: Path, keep_int4: bool = False, names: TensorNames = RELEASED
) -> QwenVLConfig:
  """Reads the config of a checkpoint folder of any kind.

  Args:
    folder: the checkpoint.
    keep_int4: of int4 weights in the released layout, whether they are to stay
      packed, rather than be dequantized as they are read.
    names: what the checkpoint calls its tensors.

  Raises:
    CheckpointError: the folder does not exist, has no valid config.json, is of
      another model family, or has no int4 weights that can be kept.
  """
  if not folder.is_dir():
    raise CheckpointError(
      f'{folder} does not exist: expected a checkpoint folder (released '
      'layout, a converted checkpoint or a training run)'
    )
  if folder.name.endswith(UNFINISHED) or (folder / UNFINISHED).exists():
    raise CheckpointError(
      f'{folder} is what an unfinished conversion left: start it again'
    )
  path = find_asset(folder, 'config.json')
  if not path.exists() and openclip.is_openclip(folder):
    return QwenVLConfig(vision=openclip.read_config(folder))
  inside = sorted(folder.glob('*/config.json'))
  if not path.exists() and inside:
    names = ', '.join(str(file.parent) for file in inside)
    raise CheckpointError(
      f'{folder} is no checkpoint itself, but holds some: name one of {names}'
    )
  released = has_released_weights(folder)
  config = config_from_hf(read_json(path), str(path), int4=not released)
  if keep_int4 and released:
    tensors = names.select(open_released(folder), str(folder))
    group = gptq.group_size(folder, tensors)
    return _with_int4(config, group, gptq.zero_offset(folder, tensors))
  if keep_int4 and config.decoder.int4_group is None:
    raise CheckpointError(
      f'{folder} holds no int4 weights: leave out keep_int4; in training, take '
      'finetune/lora.gin instead of qlora.gin'
    )
  return config


def _with_int4(
  config: QwenVLConfig, group: int | None, zero_offset: int = 1
) -> QwenVLConfig:
  decoder = dataclasses.replace(
    config.decoder, int4_group=group, int4_zero_offset=zero_offset
  )
  return config.replace(decoder=decoder)


def dequantized(config: QwenVLConfig) -> QwenVLConfig:
  """Gives the same model with plain kernels."""
  return _with_int4(config, None)


def check_whole(folder: Path) -> None:
  """Tells a run that trained a part from a model.

  Raises:
    CheckpointError: says what the folder holds, and which ones beside it are
      whole.
  """
  found = _parts(folder)
  missing = [part for part in layout.PARTS if part not in found]
  if not found or not missing:
    return
  held = [part for part in layout.PARTS if part in found] or ['params']
  whole = [
    str(path)
    for path in sorted(folder.absolute().parent.iterdir())
    if path != folder.absolute() and set(layout.PARTS) <= _parts(path)
  ]
  beside = f'; whole models beside it: {", ".join(whole)}' if whole else ''
  raise CheckpointError(
    f'{folder} is no whole model, but the run of a part: it holds '
    f'{", ".join(sorted(found))} and lacks {" and ".join(missing)}. Another '
    f'run can start from it (InitFrom.{held[0]}){beside}'
  )


def _parts(folder: Path) -> set[str]:
  """The top of the parameter tree in a folder of ours; empty of others."""
  try:
    stored = params_folder(folder)
    return set(orbax_store.metadata(stored)) if stored else set()
  except (CheckpointError, OSError):  # Said where parameters are read.
    return set()


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a checkpoint folder holds, before it is compared with its config.

  Attributes:
    form: how it is stored.
    stored: name to what has a shape and a dtype: parameter paths of Orbax
      arrays, else the released tensors as they are in the files.
    tensors: the same with packed weights dequantized, if they are to be.
    parts: of the model.
    table: rules of those parts.
    orbax: where the arrays are, None of other forms.
    notes: what to say of it, a line each.
  """

  form: str
  stored: Mapping[str, Any]
  tensors: Mapping[str, Any]
  parts: tuple[str, ...]
  table: list[Rule]
  orbax: Path | None
  notes: tuple[str, ...] = ()


def look_into(
  folder: Path, config: QwenVLConfig, names: TensorNames = RELEASED
) -> Contents:
  """Finds what a checkpoint folder of any kind holds, from headers alone.

  Args:
    folder: the checkpoint.
    config: from `read_config`, which says whether int4 weights are kept.
    names: what the checkpoint calls its tensors.

  Raises:
    CheckpointError: damaged headers, or packed weights that are incomplete.
  """
  orbax, notes = params_folder(folder), []
  if orbax is not None:
    form = 'Orbax'
    if orbax.parent != folder:
      form += f', training run at step {orbax.parent.name}'
    stored = dict(layout.flatten(orbax_store.metadata(orbax)))
    tensors = stored
    if config.decoder.int4_group is not None:
      form += ', int4 (GPTQ) kept'
  elif openclip.is_openclip(folder) and not has_released_weights(folder):
    form = 'OpenCLIP'
    tensors = stored = openclip.open_vision(folder, config.vision)
  else:
    stored = names.select(open_released(folder, notes), str(folder), notes)
    tensors, files = stored, {tensor.file for tensor in stored.values()}
    form = f'released, {len(files)} {min(files).suffix} file(s)'
    if config.decoder.int4_group is not None:
      form, tensors = form + ', int4 (GPTQ)', gptq.kept(stored, config)
    elif gptq.is_quantized(stored):
      form += ', int4 (GPTQ)'
      tensors = gptq.dequantized(folder, stored, config)
  found = {layout.part_of(name) for name in tensors}
  parts = tuple(part for part in layout.PARTS if part in found)
  if form == 'OpenCLIP':
    parts = ('vision',)
  table = layout.rules(config, parts)
  return Contents(form, stored, tensors, parts, table, orbax, tuple(notes))


def open_tensors(
  folder: Path,
  config: QwenVLConfig,
  dtype=None,
  names: TensorNames = RELEASED,
  notes: list[str] | None = None,
) -> tuple[dict[str, Tensor], list[Rule]]:
  """Opens a checkpoint folder of any kind as released tensors.

  Args:
    folder: the checkpoint.
    config: from `read_config`, which says whether int4 weights are kept.
    dtype: to cast to, but for packed kernels; None keeps what is stored, and
      dequantizes int4 weights to bfloat16.
    names: what the checkpoint calls its tensors.
    notes: gets what to say of it, a line each.

  Returns:
    Released name to tensor, and the conversion table of what is there.

  Raises:
    CheckpointError: tensors missing, unknown, misshapen or damaged.
  """
  found = look_into(folder, config, names)
  if notes is not None:
    notes.extend(found.notes)
  if found.orbax is not None:
    tensors = orbax_store.open_tensors(found.orbax, found.table)
  else:
    tensors = found.tensors
    check_tensors(tensors, found.table, str(folder))
    check_dtypes(tensors, found.table, cast=dtype is not None)
    if gptq.is_quantized(found.stored) and config.decoder.int4_group is None:
      dtype = dtype or 'bfloat16'
  if dtype is not None:
    tensors = cast_all(tensors, np.dtype(dtype))
  return tensors, found.table


def open_dequantized(
  folder: Path, config: QwenVLConfig
) -> tuple[dict[str, Tensor], list[Rule]]:
  """Opens tensors as `open_tensors`, of plain kernels where packed are kept.

  Those come dequantized to float32.
  """
  tensors, table = open_tensors(folder, config)
  group = config.decoder.int4_group
  if group is None:
    return tensors, table
  groups = {
    name: Tensor.of(array, folder)
    for name, array in gptq.implied(table, group, np.dtype(np.float16))
    if name.endswith('.g_idx')
  }
  plain = dequantized(config)
  found = {layout.part_of(name) for name in tensors}
  table = layout.rules(plain, [x for x in layout.PARTS if x in found])
  return gptq.dequantized(folder, tensors | groups, plain), table


def read_params(
  folder: Path, config: QwenVLConfig, dtype=None, shardings=None, keep=None
) -> dict:
  """Reads the parameters of a checkpoint folder of any kind.

  Args:
    folder: the checkpoint.
    config: see `open_tensors`; also whether the decoder's layers are stacked
      or apart (`model.stacking`), and whether kernels are rounded to 8 bits.
    dtype: to cast to, but for packed kernels; None keeps what is stored.
    shardings: tree of shardings like the parameters; None for the first device.
    keep: predicate on paths ('decoder/embed'); others are left out unread.

  Returns:
    Nested dict of jax arrays. A process reads the shards of its own devices
    only.

  Raises:
    CheckpointError: tensors missing, unknown, misshapen or damaged.
  """
  keep = keep or (lambda path: True)
  placements = dict(layout.flatten(shardings or {}))
  stored = params_folder(folder)
  if stored is not None and config.scan_layers:
    return orbax_store.restore(stored, dtype, placements, keep)
  tensors, table = open_tensors(folder, config, dtype)
  shapes = {
    path: shape
    for path, shape in layout.parameter_shapes(
      rounding.as_stored(config)
    ).items()
    if keep(path)
  }
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def place(path):
    # Where 8 bits of a kernel go, there all of it goes before it is rounded.
    return placements.get(path, placements.get(f'{path}/values', device))

  arrays = to_devices(
    tensors,
    plan(table),
    shapes,
    {path: place(path) for path in shapes},
    BUCKET_THREADS if buckets.in_bucket(folder) else THREADS,
    outputs_first=not config.scan_layers,
    finish=rounding.finish(config, placements),
  )
  return layout.unflatten(arrays)


def check_image_ids(config: QwenVLConfig, where: str) -> None:
  """Checks that the ids of images have rows in the embedding.

  Raises:
    CheckpointError: they have none, and would be read from other rows.
  """
  size, needed = config.decoder.vocab_size, config.image_start_id + 3
  if size < needed:
    raise CheckpointError(
      f'{where}: <img>, </img> and <imgpad> are ids up to {needed - 1:,} '
      f'(image_start_id of config.json), but vocab_size is {size:,}: correct '
      'the config, or let the vocabulary grow (Conversion.vocab_size)'
    )


def check_against(config: QwenVLConfig, params: dict, where: str):
  """Compares a parameter tree with what the model expects.

  Args:
    config: of the model.
    params: nested dict of arrays, or of anything with a shape.
    where: the checkpoint, for messages.

  Raises:
    CheckpointError: names what is missing, unknown or misshapen.
  """
  check_image_ids(config, where)
  layout.check_shapes(
    layout.parameter_shapes(config),
    {path: tuple(x.shape) for path, x in layout.flatten(params)},
    where,
  )
