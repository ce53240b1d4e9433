"""OpenCLIP's ViT (ViT-bigG in stage 1) as our vision transformer.

The text tower, the class token, its position row, `ln_post` and `proj` have no
place in Qwen-VL and are left out.
"""

import dataclasses
from pathlib import Path

import einops

from qwenvl_jax.conversion import json_schema, schemas
from qwenvl_jax.conversion.families.names import without_prefix
from qwenvl_jax.conversion.reader import open_file
from qwenvl_jax.conversion.tensors import Tensor
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.model.config import VisionConfig

CONFIG = 'open_clip_config.json'

FILES = ('open_clip_model.safetensors', 'open_clip_pytorch_model.bin')

# Of `visual.`, what Qwen-VL does not use.
DROPPED = ('class_embedding', 'ln_post.weight', 'ln_post.bias', 'proj')


def is_openclip(folder: Path) -> bool:
  """Whether a folder holds an OpenCLIP checkpoint."""
  return any((folder / name).exists() for name in (CONFIG, *FILES))


def read_config(folder: Path) -> VisionConfig:
  """Reads the vision sizes of an OpenCLIP folder.

  Raises:
    CheckpointError: no vision transformer is described.
  """
  path = folder / CONFIG
  return vision_config(json_schema.read_json(path), str(path))


def vision_config(raw: dict, where: str) -> VisionConfig:
  """Takes the vision sizes from an `open_clip_config.json`.

  Args:
    raw: the parsed file.
    where: its path, for messages.

  Raises:
    CheckpointError: no vision transformer is described.
  """
  try:
    values = json_schema.check(raw, schemas.OPENCLIP, where)
    visual = values['model_cfg']['vision_cfg']
    width, patch = visual['width'], visual['patch_size']
    return VisionConfig(
      image_size=visual['image_size'],
      patch_size=patch,
      width=width,
      layers=visual['layers'],
      heads=max(width // visual['head_width'], 1),
      mlp_dim=int(width * visual['mlp_ratio']),
      position_grid=visual['image_size'] // patch,
    )
  except (CheckpointError, ConfigError) as error:
    raise CheckpointError(
      f'{error}; expected the {CONFIG} of a vision transformer'
    ) from error


def open_vision(folder: Path, config: VisionConfig) -> dict[str, Tensor]:
  """Opens the vision tower of an OpenCLIP checkpoint as Qwen-VL's.

  Args:
    folder: with `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`.
    config: of the vision tower.

  Returns:
    Qwen-VL's released name to tensor, but for what does not match.

  Raises:
    CheckpointError: no weights, or a damaged file.
  """
  path = next((folder / f for f in FILES if (folder / f).exists()), None)
  if path is None:
    raise CheckpointError(
      f'{folder} holds no OpenCLIP weights: expected {" or ".join(FILES)}'
    )
  tensors = {}
  for name, tensor in without_prefix(open_file(path), str(path)).items():
    prefix, _, rest = name.partition('visual.')
    if prefix or not rest or rest in DROPPED:
      continue
    if rest == 'positional_embedding':
      tensor = _without_class_token(tensor)
    elif '.in_proj_' in rest:
      tensor = _head_by_head(tensor, config.heads)
    tensors['transformer.' + name.replace('.in_proj_', '.in_proj.')] = tensor
  return tensors


def _without_class_token(table: Tensor) -> Tensor:
  """Gives the position table without its first row."""
  first, *rest = table.shape or (1,)
  return dataclasses.replace(
    table,
    shape=(max(first - 1, 0), *rest),
    read_into=lambda start, rows: table.read_into(start + 1, rows),
  )


def _head_by_head(fused: Tensor, heads: int) -> Tensor:
  """Gives rows [q; k; v] as the release has them, interleaved by head."""

  def read_into(start, rows):
    whole = einops.rearrange(
      fused.load(), '(qkv h d) ... -> (h qkv d) ...', qkv=3, h=heads
    )
    rows[...] = whole[start : start + len(rows)]

  return dataclasses.replace(fused, read_into=read_into)
