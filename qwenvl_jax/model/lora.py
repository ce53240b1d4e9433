"""Low-rank adaptation (LoRA) of projections.

Hu et al., arXiv 2106.09685; what PEFT computes: beside a kernel that stays as
it is, of a projection with inputs x,

  y = x kernel + bias + alpha / rank * (dropout(x) lora_a) lora_b

with `lora_a` [*in,rank] and `lora_b` [rank,*out]. Queries, keys and values of
one input share one `lora_a`, since the release has them in one fused layer:

  attn/qkv/lora_a        [D,R]
  attn/{q,k,v}/lora_b    [R,N,H]
  attn/out/lora_a        [N,H,R]
  attn/out/lora_b        [R,D]
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.fsdp import multiply

# The projections that can be adapted: path in the tree of parameters to name of
# the released layer.
TARGETS = {
  'decoder/blocks/attn/qkv': 'attn.c_attn',
  'decoder/blocks/attn/out': 'attn.c_proj',
  'decoder/blocks/mlp/up': 'mlp.w1',
  'decoder/blocks/mlp/gate': 'mlp.w2',
  'decoder/blocks/mlp/down': 'mlp.c_proj',
  'vision/blocks/attn/qkv': 'attn.in_proj',
  'vision/blocks/attn/out': 'attn.out_proj',
  'vision/blocks/mlp/up': 'mlp.c_fc',
  'vision/blocks/mlp/down': 'mlp.c_proj',
}

# The names of the parameters beside a kernel.
FACTORS = ('lora_a', 'lora_b')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Which projections are adapted, and how.

  The defaults are those of the release's `finetune.py`.

  Attributes:
    rank: R.
    alpha: the product of both factors is scaled by alpha / rank.
    dropout: share of the inputs of `lora_a` that are left out in training.
    targets: patterns (`re.fullmatch`) of the names in `TARGETS`.
    rslora: whether it is scaled by alpha / sqrt(rank) instead (rank-stabilized
      LoRA, arXiv 2312.03732).
    by_row: whether the ranks are those of several adapters side by side, and
      each row of a cache says what it multiplies each rank by
      (`KVCache.ranks`): 0 where it is another's. Without a cache, no adapter is
      used.
  """

  rank: int = 64
  alpha: float = 16.0
  dropout: float = 0.05
  targets: str | tuple[str, ...] = (
    'decoder/blocks/attn/(qkv|out)',
    'decoder/blocks/mlp/(up|gate)',
  )
  rslora: bool = False
  by_row: bool = False

  def __post_init__(self):
    if isinstance(self.targets, str):
      object.__setattr__(self, 'targets', (self.targets,))
    if self.rank < 1:
      raise ConfigError(f'LoraConfig.rank={self.rank}: must be at least 1')
    if not 0 < self.alpha < math.inf:
      raise ConfigError(f'LoraConfig.alpha={self.alpha} must be positive')
    if not 0 <= self.dropout < 1:
      raise ConfigError(f'LoraConfig.dropout={self.dropout} is not in [0, 1)')
    if not self.targets:
      raise ConfigError(f'LoraConfig.targets is empty: {_known()}')
    for pattern in self.targets:
      try:
        found = any(re.fullmatch(pattern, name) for name in TARGETS)
      except re.error as error:
        raise ConfigError(
          f'LoraConfig.targets: {pattern!r} is no regular expression: {error}'
        ) from error
      if not found:
        near = [
          name
          for name, released in TARGETS.items()
          if f'.{released}'.endswith(f'.{pattern}')
        ] or difflib.get_close_matches(pattern, TARGETS, cutoff=0.4)
        raise ConfigError(
          f'LoraConfig.targets: {pattern!r} matches no projection; '
          + (f'near are {", ".join(near)}' if near else _known())
        )

  @property
  def scale(self) -> float:
    """What the product of both factors is multiplied by."""
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

  @property
  def names(self) -> tuple[str, ...]:
    """Those of `TARGETS` that are adapted."""
    return tuple(
      name
      for name in TARGETS
      if any(re.fullmatch(pattern, name) for pattern in self.targets)
    )

  def adapts(self, path: Sequence[str]) -> bool:
    """Whether the module at a path of linen's is adapted."""
    return re.sub(r'/blocks_\d+/', '/blocks/', '/'.join(path)) in self.names


def _known() -> str:
  return f'known are {", ".join(TARGETS)}'


def is_factor(path: str) -> bool:
  """Whether a parameter's path is that of a low-rank factor.

  >>> is_factor('decoder/blocks/attn/q/lora_b')
  True
  """
  return path.endswith(tuple(f'/{name}' for name in FACTORS))


class Shared(nn.Module):
  """The first factor of several projections of one input.

  Attributes:
    shape: of the input's contracted axes.
    axes: their logical names.
    lora: None for none.
    dtype: of the product.
    param_dtype: of the factor.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  lora: LoraConfig | None
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x, ranks=None):
    """[...,*in] to [...,R], scaled; None if it is not adapted."""
    if self.lora is None or not self.lora.adapts(self.path):
      return None
    return reduced(self, x, self.shape, self.axes, ranks)


def reduced(module: nn.Module, x, shape, axes, ranks=None) -> jax.Array:
  """Multiplies by a new parameter `lora_a` of a module, and by the scale.

  Args:
    module: has `lora`, `dtype` and `param_dtype`. Its random stream 'dropout',
      if there is one, draws what is left out.
    x: [...,*in].
    shape: of `in`.
    axes: logical names of `in`.
    ranks: [B,1,R] float32 of `LoraConfig.by_row`.

  Returns:
    [...,R].
  """
  lora = module.lora
  x = x.astype(module.dtype)
  if lora.dropout and module.has_rng('dropout'):
    x = nn.Dropout(lora.dropout, deterministic=False)(x)
  axes = (*axes, 'rank')
  factor = module.param(
    'lora_a',
    nn.with_logical_partitioning(_first_init, axes),
    (*shape, lora.rank),
    module.param_dtype,
  )
  low = multiply(x, factor.astype(module.dtype), axes, len(shape))
  if not lora.by_row:
    return lora.scale * low
  return low * (0 if ranks is None else ranks.astype(low.dtype))


def raised(module: nn.Module, low, shape, axes) -> jax.Array:
  """Multiplies what `reduced` gave by a new parameter `lora_b` of a module.

  Args:
    module: has `lora`, `dtype` and `param_dtype`.
    low: [...,R].
    shape: of the outputs.
    axes: logical names of the outputs.

  Returns:
    [...,*out].
  """
  axes = ('rank', *axes)
  factor = module.param(
    'lora_b',
    nn.with_logical_partitioning(nn.initializers.zeros, axes),
    (low.shape[-1], *shape),
    module.param_dtype,
  )
  return multiply(low, factor.astype(module.dtype), axes, 1)


def _first_init(key, shape, dtype=jnp.float32):
  """Uniform within 1 / sqrt(inputs), as torch's linear layers start."""
  bound = math.prod(shape[:-1]) ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)
