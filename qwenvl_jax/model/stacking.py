"""The decoder's parameters for training, and for inference.

Training scans over layers that are stacked along a leading axis, and multiplies
by kernels whose inputs come first:

  decoder/blocks/attn/q/kernel      [L,D,N,H]
  decoder/lm_head/kernel            [D,V]

Inference runs one layer after the other, each with arrays of its own, as linen
names the modules of a list; the outputs of kernels come first, as released:

  decoder/blocks_0/attn/q/kernel    [N,H,D]
  decoder/blocks_1/attn/q/kernel    [N,H,D] ..
  decoder/lm_head/kernel            [V,D]

Packed kernels and the other parts of the model are the same in both trees.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_STACKED = 'blocks'
# How many axes of a kernel are inputs, where they are more than one.
_INPUTS = {'out': 2}
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
  """Turns parameters for training into those for inference.

  Args:
    params: stacked tree of arrays, `jax.ShapeDtypeStruct`s (whose shardings are
      dropped) or either of them in `nn.LogicallyPartitioned`.

  Returns:
    The parameters for inference; a tree whose layers are apart already as it
    is. Of NumPy arrays they are views, of jax arrays copies.
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
  return params | {'decoder': _map_kernels(_outputs_first, rest | apart)}


def stack_layers(params: dict) -> dict:
  """Turns parameters for inference into those for training.

  Args:
    params: tree with layers apart, leaves as there.

  Returns:
    The parameters for training; a tree that is stacked already as it is.
  """
  decoder = params.get('decoder', {})
  names = sorted(filter(_APART.fullmatch, decoder), key=_number)
  if not names:
    return params
  decoder = _map_kernels(_inputs_first, decoder)
  rest = {k: v for k, v in decoder.items() if k not in names}
  blocks = jax.tree.map(
    lambda *leaves: _stack(leaves),
    *(decoder[name] for name in names),
    is_leaf=_is_boxed,
  )
  return params | {'decoder': rest | {_STACKED: blocks}}


def is_plain_kernel(path: str) -> bool:
  """Whether a path is a kernel of the decoder that is not packed.

  >>> is_plain_kernel('decoder/blocks_0/mlp/up/kernel')
  True
  """
  return path.startswith('decoder/') and path.endswith('/kernel')


def inputs_of(path: str) -> int:
  """How many axes of the kernel at a path of the decoder are inputs."""
  return _INPUTS.get(path.split('/')[-2], 1)


def _map_kernels(change, decoder: dict) -> dict:
  """Changes (kernel, how many of its axes are inputs) all plain kernels."""

  def leaf(path, x):
    names = [entry.key for entry in path]
    if names[-1] != 'kernel':
      return x
    return change(x, inputs_of('/'.join(names)))

  return jax.tree_util.tree_map_with_path(leaf, decoder, is_leaf=_is_boxed)


def _outputs_first(kernel, inputs: int):
  return _move_axes(kernel, range(inputs), range(-inputs, 0))


def _inputs_first(kernel, inputs: int):
  return _move_axes(kernel, range(-inputs, 0), range(inputs))


def _move_axes(x, source, target):
  source, target = tuple(source), tuple(target)
  if _is_boxed(x):
    order = np.moveaxis(np.empty(range(len(x.names))), source, target).shape
    names = tuple(x.names[axis] for axis in order)
    return x.replace(value=_move_axes(x.value, source, target), names=names)
  if isinstance(x, jax.ShapeDtypeStruct):
    shape = np.moveaxis(
      np.broadcast_to(np.int8(0), x.shape), source, target
    ).shape
    return jax.ShapeDtypeStruct(shape, x.dtype)
  move = np.moveaxis if isinstance(x, np.ndarray) else jnp.moveaxis
  return move(x, source, target)


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
