"""The decoder's layers in one array each, or apart.

Training scans over layers that are stacked along a leading axis:

  decoder/blocks/attn/q/kernel      [L,D,N,H]

Inference runs one layer after the other, each with arrays of its own, as linen
names the modules of a list:

  decoder/blocks_0/attn/q/kernel    [D,N,H]
  decoder/blocks_1/attn/q/kernel    [D,N,H] ..

The other parts of the model are the same in both trees.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_STACKED = 'blocks'
_APART = re.compile(r'blocks_(\d+)')
_ROOT = f'decoder/{_STACKED}/'


def is_stacked(path: str) -> bool:
  """Whether a parameter's path is one of the decoder's stacked layers."""
  return path.startswith(_ROOT)


def apart_path(path: str, layer: int) -> str:
  """Gives the path of one layer's parameter in a tree with layers apart.

  >>> apart_path('decoder/blocks/attn/q/kernel', 3)
  'decoder/blocks_3/attn/q/kernel'

  Args:
    path: of a parameter in a stacked tree.
    layer: which layer; of a parameter outside of the decoder's layers, the path
      stays as it is.
  """
  if not is_stacked(path):
    return path
  return f'decoder/{_STACKED}_{layer}/{path.removeprefix(_ROOT)}'


def unstack_layers(params: dict) -> dict:
  """Takes the decoder's layers apart.

  Args:
    params: stacked tree of arrays, `jax.ShapeDtypeStruct`s (whose shardings are
      dropped) or either of them in `nn.LogicallyPartitioned`.

  Returns:
    The same parameters with `decoder/blocks_0`, .. in place of
    `decoder/blocks`; a tree whose layers are apart already as it is. Of NumPy
    arrays the layers are views, of jax arrays copies.
  """
  blocks = params.get('decoder', {}).get(_STACKED)
  if blocks is None:
    return params
  leaves, tree = jax.tree.flatten(blocks, is_leaf=_is_boxed)
  layers = zip(*map(_unstack, leaves), strict=True)
  apart = {
    f'{_STACKED}_{i}': jax.tree.unflatten(tree, layer)
    for i, layer in enumerate(layers)
  }
  rest = {k: v for k, v in params['decoder'].items() if k != _STACKED}
  return params | {'decoder': rest | apart}


def stack_layers(params: dict) -> dict:
  """Stacks the decoder's layers: the inverse of `unstack_layers`.

  Args:
    params: tree with layers apart, leaves as there.

  Returns:
    The same parameters stacked; a tree that is stacked already as it is.
  """
  decoder = params.get('decoder', {})
  names = sorted(filter(_APART.fullmatch, decoder), key=_number)
  if not names:
    return params
  rest = {k: v for k, v in decoder.items() if k not in names}
  blocks = jax.tree.map(
    lambda *leaves: _stack(leaves),
    *(decoder[name] for name in names),
    is_leaf=_is_boxed,
  )
  return params | {'decoder': rest | {_STACKED: blocks}}


def _number(name: str) -> int:
  return int(_APART.fullmatch(name)[1])


def _is_boxed(leaf: Any) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def _unstack(leaf) -> list:
  if _is_boxed(leaf):
    names = leaf.names[1:]
    return [leaf.replace(value=x, names=names) for x in _unstack(leaf.value)]
  if isinstance(leaf, jax.ShapeDtypeStruct):
    layers, *shape = leaf.shape
    return [jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)] * layers
  # One compiled program an array, not one for each of its layers.
  return list(leaf if isinstance(leaf, np.ndarray) else jnp.unstack(leaf))


def _stack(leaves):
  first = leaves[0]
  if _is_boxed(first):
    values = _stack([leaf.value for leaf in leaves])
    return first.replace(value=values, names=('layers', *first.names))
  if isinstance(first, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
  stack = np.stack if isinstance(first, np.ndarray) else jnp.stack
  return stack(leaves)
