"""The decoder's layers stacked and apart."""

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.batch import text_batch
from qwenvl_jax.conversion import layout
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.model.stacking import (
  apart_path,
  stack_layers,
  unstack_layers,
)


def test_every_layer_is_found_under_its_own_path():
  stacked = dict(layout.flatten(golden.params()))
  apart = dict(layout.flatten(unstack_layers(golden.params())))
  for path, array in stacked.items():
    is_layer = path.startswith('decoder/blocks/')
    if not is_layer and path != 'decoder/lm_head/kernel':
      assert apart.pop(path) is array
      continue
    for layer, values in enumerate(np.asarray(array) if is_layer else [array]):
      found = apart.pop(apart_path(path, layer))
      if path.endswith('/kernel'):  # Inputs come last: two axes of `out`.
        count = 2 if '/out/' in path else 1
        source, target = range(count), range(-count, 0)
        values = np.moveaxis(np.asarray(values), source, target)
      np.testing.assert_array_equal(found, values)
  assert not apart


def test_stacking_again_gives_the_tree_that_was():
  for params in (golden.params(), jax.tree.map(np.asarray, golden.params())):
    again = stack_layers(unstack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert unstack_layers(unstack_layers(params)).keys() == params.keys()
    assert stack_layers(params) is params


def test_views_of_numpy_arrays():
  values = np.arange(6.0).reshape(2, 3)
  apart = unstack_layers({'decoder': {'blocks': {'scale': values}}})
  assert np.shares_memory(apart['decoder']['blocks_1']['scale'], values)


def test_twelve_layers_keep_their_order():
  values = jnp.arange(12)
  apart = unstack_layers({'decoder': {'blocks': {'scale': values}}})
  shuffled = dict(sorted(apart['decoder'].items()))
  again = stack_layers({'decoder': shuffled})
  np.testing.assert_array_equal(again['decoder']['blocks']['scale'], values)


def test_shapes_and_logical_axes():
  boxed = jax.eval_shape(
    QwenVL(golden.config()).init, jax.random.key(0), text_batch([[0]])
  )['params']
  apart = unstack_layers(boxed)
  kernel = apart['decoder']['blocks_1']['mlp']['up']['kernel']
  c = golden.config().decoder
  assert kernel.value.shape == (c.mlp_dim, c.dim)
  assert kernel.names == ('mlp', 'embed')
  kernel = apart['decoder']['blocks_1']['attn']['out']['kernel']
  assert kernel.names == ('embed', 'heads', 'head_dim')
  assert jax.tree.all(
    jax.tree.map(
      lambda a, b: (a.names, a.value) == (b.names, b.value),
      stack_layers(apart),
      boxed,
      is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )
  )
