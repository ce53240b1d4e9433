"""OpenCLIP's ViT (ViT-bigG in stage 1) as our vision transformer.

The text tower, the class token, its position row, `ln_post` and `proj` have no
place in Qwen-VL and are left out; `read_vision` says which names it expects.
"""

import dataclasses

import numpy as np

from qwenvl_jax.conversion.layout import Rule, rules
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig, VisionConfig

# OpenCLIP computes its norms with this epsilon, Qwen-VL with 1e-6.
OPENCLIP_EPS = 1e-5

# Of `visual.`, what Qwen-VL does not use.
DROPPED = ('class_embedding', 'ln_post.weight', 'ln_post.bias', 'proj')


def vision_config(raw: dict, where: str) -> VisionConfig:
  """Vision sizes from an `open_clip_config.json`.

  Args:
    raw: the parsed file.
    where: its path, for messages.

  Raises:
    CheckpointError: no vision transformer is described.
  """
  try:
    visual = raw['model_cfg']['vision_cfg']
    width, patch = visual['width'], visual['patch_size']
    return VisionConfig(
      image_size=visual['image_size'],
      patch_size=patch,
      width=width,
      layers=visual['layers'],
      heads=width // visual['head_width'],
      mlp_dim=int(width * visual['mlp_ratio']),
      position_grid=visual['image_size'] // patch,
    )
  except (KeyError, TypeError) as error:
    raise CheckpointError(
      f'{where}: no vision transformer described (key {error} is missing); '
      'expected the open_clip_config.json of a ViT'
    ) from error


def openclip_rules(config: QwenVLConfig) -> list[Rule]:
  """The vision part of the conversion table under OpenCLIP's names."""
  return [_rename(rule) for rule in rules(config, parts=('vision',))]


def _rename(rule: Rule) -> Rule:
  name = rule.tensor.removeprefix('transformer.')
  pattern, shape = rule.pattern, rule.shape
  if '.in_proj.' in name:
    # [q; k; v] one after the other, not head by head.
    name = name.replace('.in_proj.', '.in_proj_')
    pattern = pattern.replace('(m c j)', '(c m j)')
  if name == 'visual.positional_embedding':
    shape = (shape[0] + 1, shape[1])
  return dataclasses.replace(rule, tensor=name, pattern=pattern, shape=shape)


def drop_class_row(name: str, tensor: np.ndarray) -> np.ndarray:
  """Removes the class token's row of the position table."""
  return tensor[1:] if name == 'visual.positional_embedding' else tensor
