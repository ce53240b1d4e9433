"""AdamW as the paper trains it, told by path what to train and how fast.

Parameters are addressed by path, e.g. 'vision/blocks/attn/q/kernel'. What no
`trainable` pattern matches is frozen: it has no optimizer state, no gradient
and no float32 master copy.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from qwenvl_jax.errors import ConfigError, check_fields
from qwenvl_jax.model.qwen_vl import CONSTANTS
from qwenvl_jax.train.schedule import warmup_cosine

# Norms' scales and all biases are not decayed, everything else is (position
# tables and queries included): what the golden trajectory calls vectors.
NOT_DECAYED = ('bias', 'scale')

_FIRST_LAYER = ('vision/patch_embed/', 'vision/pos_embed', 'vision/ln_pre/')
_BLOCKS = 'vision/blocks/'


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with warm-up, cosine, clipping and per-path rates.

  Attributes:
    peak: learning rate at the end of the warm-up.
    end: learning rate at the end of the cosine.
    warmup: updates of the warm-up.
    steps: updates of the whole schedule.
    weight_decay: decoupled, times the learning rate; not on biases and norms.
    clip: largest global norm of the gradient of the trained parameters.
    vision_layer_decay: factor per layer that vision layers are away from the
      adapter (paper: 0.95); None for none.
    trainable: patterns (`re.fullmatch`) of the paths to train.
    rates: pattern -> factor on the learning rate, first match counts.
  """

  peak: float
  end: float
  warmup: int
  steps: int
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-6
  weight_decay: float = 0.05
  clip: float = 1.0
  vision_layer_decay: float | None = None
  trainable: str | tuple[str, ...] = ('.*',)
  rates: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if isinstance(self.trainable, str):
      object.__setattr__(self, 'trainable', (self.trainable,))
    for pattern in (*self.trainable, *self.rates):
      try:
        re.compile(pattern)
      except re.error as e:
        raise ConfigError(
          f'OptimizerConfig: {pattern!r} is no regular expression: {e}'
        ) from e
    for fits, rule, *names in (
      (lambda x: x > 0, 'must be positive', 'peak', 'clip', 'eps'),
      (lambda x: x >= 0, 'must not be negative', 'end', 'weight_decay'),
      (lambda x: 0 <= x < 1, 'is not in [0, 1)', 'b1', 'b2'),
      (lambda x: 0 < x <= 1, 'is not in (0, 1]', 'vision_layer_decay'),
      (
        lambda x: x < 2**31,
        'is too large: updates are counted in int32',
        'steps',
      ),
    ):
      check_fields(self, fits, rule, *names)
    for pattern, rate in self.rates.items():
      if not rate >= 0:
        raise ConfigError(
          f'OptimizerConfig.rates: {rate} of {pattern!r} is negative'
        )
    warmup_cosine(self.peak, self.end, self.warmup, self.steps)

  @property
  def schedule(self):
    """Learning rate of update k; see `warmup_cosine`."""
    return warmup_cosine(self.peak, self.end, self.warmup, self.steps)


def flatten(tree: Any) -> dict[str, Any]:
  """Nested dict to path -> leaf; paths joined by '/'."""
  return flax.traverse_util.flatten_dict(tree, sep='/')


def unflatten(flat: dict[str, Any]) -> Any:
  """Returns the tree of a dict from paths to leaves."""
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def is_trained(path: str, config: OptimizerConfig) -> bool:
  """Returns whether a parameter is trained: by pattern, and no constant."""
  return path not in CONSTANTS and any(
    re.fullmatch(pattern, path) for pattern in config.trainable
  )


def split(params: Any, config: OptimizerConfig) -> tuple[Any, Any]:
  """Parameters (or anything of their structure) to (trained, frozen) trees.

  Raises:
    ConfigError: a pattern matches no parameter, or nothing would be trained.
  """
  flat = flatten(params)
  _check_patterns(config, list(flat))
  trained = {k: v for k, v in flat.items() if is_trained(k, config)}
  frozen = {k: v for k, v in flat.items() if k not in trained}
  if not trained:
    raise ConfigError(
      f'OptimizerConfig.trainable={config.trainable} leaves nothing to train'
    )
  return unflatten(trained), unflatten(frozen)


def merge(trained: Any, frozen: Any) -> Any:
  """Undoes `split`."""
  return unflatten({**flatten(trained), **flatten(frozen)})


def _check_patterns(config: OptimizerConfig, paths: list[str]) -> None:
  for name in ('trainable', 'rates'):
    for pattern in getattr(config, name):
      if any(re.fullmatch(pattern, path) for path in paths):
        continue
      near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3)
      roots = sorted({path.split('/')[0] + '/.*' for path in paths})
      raise ConfigError(
        f'OptimizerConfig.{name}: {pattern!r} matches no parameter. Patterns '
        f'match whole paths; possible are {roots}'
        + (f', or paths such as {near}' if near else '')
      )


def rate_factor(
  path: str, shape: tuple[int, ...], config: OptimizerConfig, blocks: int
) -> float | jax.Array:
  """What one parameter's learning rate is multiplied by.

  Args:
    path: of the parameter.
    shape: of the parameter; stacked vision blocks have a leading axis L.
    config: see `OptimizerConfig`.
    blocks: L of the vision tower.

  Returns:
    A float, or float32 [L,1,...] for a leaf of the stacked vision blocks:
    layer `id` has decay**(blocks+1-id), where id is 0 for the patch embedding,
    the position table and `ln_pre`, and i+1 for block i.

  Raises:
    ConfigError: a vision parameter that the decay does not know.
  """
  factor = next(
    (f for pattern, f in config.rates.items() if re.fullmatch(pattern, path)),
    1.0,
  )
  decay = config.vision_layer_decay
  if decay is None or not path.startswith('vision/'):
    return factor
  if path.startswith(_FIRST_LAYER):
    return factor * decay ** (blocks + 1)
  if path.startswith(_BLOCKS):
    block = jnp.arange(blocks).reshape(blocks, *(1,) * (len(shape) - 1))
    return factor * jnp.float32(decay) ** (blocks - block)
  raise ConfigError(
    f'{path}: unknown to the vision layer-wise decay; it knows '
    f'{(*_FIRST_LAYER, _BLOCKS)}'
  )


def _rate_factors(trained: Any, config: OptimizerConfig) -> Any:
  flat = flatten(trained)
  blocks = next((v.shape[0] for k, v in flat.items() if _BLOCKS in k), None)
  if config.vision_layer_decay is not None and blocks is None:
    raise ConfigError(
      'OptimizerConfig.vision_layer_decay is set, but no vision block is '
      'trained: set it to None'
    )
  return unflatten(
    {k: rate_factor(k, v.shape, config, blocks) for k, v in flat.items()}
  )


def _decayed(trained: Any) -> Any:
  flat = flatten(trained)
  return unflatten(
    {path: path.split('/')[-1] not in NOT_DECAYED for path in flat}
  )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """The transformation of the trained tree's gradients to its updates.

  Clip, Adam, decoupled decay, layer-wise rates, schedule: torch's AdamW with
  the learning rate of each parameter scaled (so its decay is scaled too).
  """

  def scale_rates(updates, params=None):
    del params
    return jax.tree.map(
      lambda u, f: u * f, updates, _rate_factors(updates, config)
    )

  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.scale_by_adam(config.b1, config.b2, config.eps),
    optax.add_decayed_weights(config.weight_decay, _decayed),
    optax.stateless(scale_rates),
    optax.scale_by_schedule(lambda k: -config.schedule(k)),
  )
