"""What a layer keeps from its forward for its backward pass, by name.

Blocks name what is dear to compute again (`keep`); a policy is the set of names
that are kept beside the layer's input. Everything else is computed again.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from qwenvl_jax.fsdp import GATHERED, splits_params

# Values of a layer of width D, with MLP width F and T tokens, by name:
QUERY_KEY_VALUE = 'qkv'  # 3 T D, after the rotary embedding
ATTENTION = 'attention'  # T D, and T a head: what the attention kernel returns
RESIDUAL = 'residual'  # T D, between attention and MLP
UP = 'up'  # T F
GATE = 'gate'  # T F, decoder only
# T a norm in float32: what it divides by and subtracts. A thousandth of the
# layer's input, and kept by all: a norm computed again then reads x once.
NORM = 'norm'

_NAMES = {
  'full': (),
  'attention': (ATTENTION,),
  'qkv_attention': (QUERY_KEY_VALUE, ATTENTION),
  'qkv_attention_residual': (QUERY_KEY_VALUE, ATTENTION, RESIDUAL),
  'qkv_attention_up': (QUERY_KEY_VALUE, ATTENTION, UP),
  'qkv_attention_residual_up': (QUERY_KEY_VALUE, ATTENTION, RESIDUAL, UP),
  'products': (QUERY_KEY_VALUE, ATTENTION, RESIDUAL, UP, GATE),
}

POLICIES = ('none', *_NAMES, 'dots')


def _policy(name: str):
  saveable = jax.checkpoint_policies
  if name == 'none':
    return saveable.save_anything_except_these_names(GATHERED)
  if name == 'dots':
    return saveable.dots_with_no_batch_dims_saveable
  return saveable.save_only_these_names(NORM, *_NAMES[name])


def remat(module: Callable, policy: str) -> Callable:
  """Rematerializes a layer's class under one of `POLICIES`.

  'none' keeps everything, 'full' the layer's input only, 'products' whatever a
  matrix product would have to make again, 'dots' the products' results; the
  others what their names say.
  """
  if policy == 'none' and not splits_params():
    return module
  return nn.remat(
    module,
    policy=_policy(policy),
    prevent_cse=False,  # Layers run inside a scan, which already prevents it.
  )


def keep(x: jax.Array, name: str) -> jax.Array:
  """Names a value for the policies.

  Args:
    x: an activation of any shape and dtype.
    name: as policies have it.

  Returns:
    The same values.
  """
  return checkpoint_name(x, name)
