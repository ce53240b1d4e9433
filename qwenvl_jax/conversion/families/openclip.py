"""OpenCLIP's ViT (ViT-bigG in stage 1) as our vision transformer.

The text tower, the class token, its position row, `ln_post` and `proj` have no
place in Qwen-VL and are left out.
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.conversion import json_schema, schemas
from qwenvl_jax.conversion.families.names import without_prefix
from qwenvl_jax.conversion.families.qwen_vl.table import rules
from qwenvl_jax.conversion.reader import Tensor, open_file
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.model.config import QwenVLConfig, VisionConfig

CONFIG = 'open_clip_config.json'

FILES = ('open_clip_model.safetensors', 'open_clip_pytorch_model.bin')

_POSITIONS = 'visual.positional_embedding'

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


def openclip_rules(config: QwenVLConfig) -> list[Rule]:
  """Makes the vision part of the conversion table under OpenCLIP's names."""
  return [_rename(rule) for rule in rules(config, parts=('vision',))]


def _rename(rule: Rule) -> Rule:
  name = rule.tensor.removeprefix('transformer.')
  pattern = rule.pattern
  if '.in_proj.' in name:
    # [q; k; v] one after the other, not head by head.
    name = name.replace('.in_proj.', '.in_proj_')
    pattern = pattern.replace('(heads qkv head_dim)', '(qkv heads head_dim)')
  return dataclasses.replace(rule, tensor=name, pattern=pattern)


def open_vision(folder: Path) -> dict[str, Tensor]:
  """Opens the vision tower of an OpenCLIP checkpoint.

  Args:
    folder: with `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`.

  Returns:
    OpenCLIP's name to tensor, as `openclip_rules` expect them but for what
    does not match.

  Raises:
    CheckpointError: no weights, or a damaged file.
  """
  path = next((folder / f for f in FILES if (folder / f).exists()), None)
  if path is None:
    raise CheckpointError(
      f'{folder} holds no OpenCLIP weights: expected {" or ".join(FILES)}'
    )
  tensors = {
    name: tensor
    for name, tensor in without_prefix(open_file(path), str(path)).items()
    if name.startswith('visual.')
    and name.removeprefix('visual.') not in DROPPED
  }
  if _POSITIONS in tensors:
    tensors[_POSITIONS] = _without_class_token(tensors[_POSITIONS])
  return tensors


def _without_class_token(table: Tensor) -> Tensor:
  """Gives the position table without its first row."""
  first, *rest = table.shape or (1,)
  return dataclasses.replace(
    table,
    shape=(max(first - 1, 0), *rest),
    read=lambda start, stop: table.read(start + 1, stop + 1),
    stored=None,
  )
