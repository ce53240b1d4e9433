"""Checkpoint folders: the released layout, ours, and a training run.

Ours keeps the released side files and has Orbax parameters:

  config.json  generation_config.json  qwen.tiktoken  params/

A training run has the same files at its root and `checkpoints/STEP/params/`;
opening it means its newest complete step.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from qwenvl_jax.conversion import layout
from qwenvl_jax.conversion.hf_config import config_from_hf, config_to_hf
from qwenvl_jax.conversion.reader import (
  open_released,
  read_json,
)
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.text.tokenizer import Tokenizer

VOCABULARY = 'qwen.tiktoken'

# What the release's generation_config.json says; ids follow the vocabulary.
_GENERATION = {
  'chat_format': 'chatml',
  'do_sample': True,
  'max_new_tokens': 512,
  'max_window_size': 6144,
  'top_k': 0,
  'top_p': 0.3,
}


def params_folder(folder: Path) -> Path | None:
  """The Orbax parameters under a folder of ours, None if it is not ours.

  Raises:
    CheckpointError: a training run without a complete checkpoint.
  """
  if (folder / 'params').is_dir():
    return folder / 'params'
  steps = folder / 'checkpoints'
  if not steps.is_dir():
    return None
  complete = [
    int(path.name)
    for path in steps.iterdir()
    if path.name.isdigit() and (path / 'params').is_dir()
  ]
  if not complete:
    raise CheckpointError(
      f'{steps} holds no complete checkpoint yet: let the run save one first'
    )
  return steps / str(max(complete)) / 'params'


def _side_file(folder: Path, name: str) -> Path:
  """A side file of a folder; for one step of a run, at the run's root."""
  for place in (folder, folder.parent.parent):
    if (place / name).exists():
      return place / name
  return folder / name


def read_config(folder: Path) -> QwenVLConfig:
  """The config of a checkpoint folder of any kind.

  Raises:
    CheckpointError: the folder does not exist or has no valid config.json.
  """
  if not folder.is_dir():
    raise CheckpointError(
      f'{folder} does not exist: expected a checkpoint folder (released '
      'layout, a converted checkpoint or a training run)'
    )
  path = _side_file(folder, 'config.json')
  return config_from_hf(read_json(path), str(path))


def read_tokenizer(folder: Path) -> Tokenizer | None:
  """The folder's own vocabulary, None if it has none."""
  path = _side_file(folder, VOCABULARY)
  return Tokenizer.from_file(path) if path.exists() else None


def read_params(
  folder: Path, config: QwenVLConfig, dtype=None, shardings=None, keep=None
) -> dict:
  """Parameters of a checkpoint folder of any kind.

  Args:
    folder: the checkpoint.
    config: from `read_config`.
    dtype: to cast to; None keeps what is stored.
    shardings: tree of `jax.sharding.Sharding` like the parameters (may be
      partial with `keep`); None puts everything on the default device.
    keep: predicate on paths ('decoder/embed'); others are left out unread.

  Returns:
    Nested dict of jax arrays.

  Raises:
    CheckpointError: tensors missing, unknown, misshapen or damaged.
  """
  keep = keep or (lambda path: True)
  placements = dict(layout.flatten(shardings or {}))
  stored = params_folder(folder)
  if stored is not None:
    return _read_orbax(stored, dtype, placements, keep)
  tensors = open_released(folder)
  parts = ['decoder', 'vision', 'adapter']
  if not any(name.startswith('transformer.visual.') for name in tensors):
    parts = ['decoder']
  table = layout.rules(config, parts)
  layout.check_shapes(
    layout.released_shapes(table),
    {name: tensor.shape for name, tensor in tensors.items()},
    str(folder),
  )
  leaves = {}
  for rule in table:
    if any(keep(path) for path in rule.paths):
      tree = layout.from_released([rule], lambda name: tensors[name].load())
      for path, value in layout.flatten(tree):
        value = value if dtype is None else value.astype(dtype)
        leaves[path] = jax.device_put(value, placements.get(path))
  return layout.unflatten(leaves)


def _metadata(path: Path) -> dict:
  """Shapes and dtypes of Orbax parameters."""
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.metadata(path.absolute()).item_metadata.tree
  except Exception as error:
    raise CheckpointError(
      f'{path} cannot be opened as Orbax parameters ({error}); the checkpoint '
      'is incomplete or damaged'
    ) from error


def _read_orbax(path: Path, dtype, placements, keep) -> dict:
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = layout.unflatten(
    {
      name: jax.ShapeDtypeStruct(
        leaf.shape, dtype or leaf.dtype, sharding=placements.get(name, device)
      )
      for name, leaf in layout.flatten(_metadata(path))
      if keep(name)
    }
  )
  if not wanted:
    return {}
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
        path.absolute(),
        ocp.args.PyTreeRestore(
          item=wanted,
          restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
          partial_restore=True,
        ),
      )
  except Exception as error:
    raise CheckpointError(
      f'{path} cannot be restored ({error}); a file of it is missing or damaged'
    ) from error


def write_side_files(
  folder: Path, config: QwenVLConfig, vocabulary: Path | None
):
  """Writes config.json, generation_config.json and the vocabulary."""
  folder.mkdir(parents=True, exist_ok=True)
  _write_json(folder / 'config.json', config_to_hf(config))
  end = config.image_start_id - 214  # <|endoftext|> heads the special tokens.
  _write_json(
    folder / 'generation_config.json',
    _GENERATION | {'eos_token_id': end, 'pad_token_id': end},
  )
  if vocabulary is not None and vocabulary != folder / VOCABULARY:
    shutil.copyfile(vocabulary, folder / VOCABULARY)


def _write_json(path: Path, content: dict):
  path.write_text(json.dumps(content, indent=2) + '\n')


def write_params(folder: Path, params: dict):
  """Saves parameters as `folder/params`, atomically."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save((folder / 'params').absolute(), params)


def check_against(config: QwenVLConfig, params: dict, where: str):
  """Compares a parameter tree with what the model expects.

  Args:
    config: of the model.
    params: nested dict of arrays, or of anything with a shape.
    where: the checkpoint, for messages.

  Raises:
    CheckpointError: names what is missing, unknown or misshapen.
  """
  layout.check_shapes(
    layout.parameter_shapes(config),
    {path: tuple(x.shape) for path, x in layout.flatten(params)},
    where,
  )


@dataclasses.dataclass(frozen=True)
class Part:
  """One row of `inspect`: vision, adapter or decoder."""

  name: str
  tensors: int
  parameters: int
  bytes: int
  dtypes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
  """What `inspect` found.

  Attributes:
    kind: 'released layout' or 'Orbax'.
    parts: sizes by part of the model.
    problem: what does not match config.json, None if all is there.
  """

  kind: str
  parts: tuple[Part, ...]
  problem: str | None


def inspect(folder: Path) -> Report:
  """What is in a checkpoint folder, without reading its tensors.

  Raises:
    CheckpointError: it is no checkpoint folder.
  """
  config = read_config(folder)
  stored = params_folder(folder)
  if stored is None:
    kind, tensors = 'released layout', open_released(folder)
    expected = layout.released_shapes(layout.rules(config))
  else:
    kind, tensors = 'Orbax', dict(layout.flatten(_metadata(stored)))
    expected = layout.parameter_shapes(config)
  problem = None
  try:
    layout.check_shapes(
      expected, {n: tuple(t.shape) for n, t in tensors.items()}, str(folder)
    )
  except CheckpointError as error:
    problem = str(error)
  groups = {}
  for name, tensor in tensors.items():
    groups.setdefault(layout.part_of(name), []).append(tensor)
  groups['total'] = list(tensors.values())
  parts = tuple(
    Part(
      name,
      len(group),
      sum(math.prod(t.shape) for t in group),
      sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in group),
      tuple(sorted({str(np.dtype(t.dtype)) for t in group})),
    )
    for name, group in groups.items()
  )
  return Report(kind, parts, problem)
