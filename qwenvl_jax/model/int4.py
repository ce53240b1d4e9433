"""Kernels of 4 bits, kept packed as the Int4 release has them.

A kernel [in,*out] is three arrays, all as released:

  words   [in/8,*out] int32       8 values along `in`, the lowest bits first
  zeros   [groups,*out/8] int32   zero points less an offset (1 in the release),
                                  8 along the last axis
  scales  [groups,*out]           of `group` inputs each

and stands for scales[g] * (value - zero[g]). Integers of 32 bits are stored
and held at 4 bits a weight everywhere; arrays of `jnp.int4` are so only on
devices.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.fsdp import gathered

PER_WORD = 8  # Values of 4 bits in 32.


class Int4Kernel(nn.Module):
  """A packed kernel, multiplied by.

  Its values exist only for the product, of one layer at a time. They are those
  that dequantizing gives: computed in float32, then cast.

  Attributes:
    shape: of the kernel that this stands for, inputs first.
    axes: logical axis names of that kernel.
    contracted: how many of its axes are inputs. They are packed as one axis,
      which is split over the mesh like the first of them.
    group: how many inputs share a scale and a zero point.
    dtype: of the product.
    zero_offset: what is added to stored zero points.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  contracted: int
  group: int
  dtype: Any
  zero_offset: int = 1

  @nn.compact
  def __call__(self, x):
    """[...,*in] to [...,*out]."""
    inputs = math.prod(self.shape[: self.contracted])
    outputs = self.shape[self.contracted :]
    axes = (self.axes[0], *self.axes[self.contracted :])

    def param(name, shape, dtype):
      init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
      return gathered(self.param(name, init, shape, dtype), axes)

    groups = inputs // self.group
    words = param('words', (inputs // PER_WORD, *outputs), jnp.int32)
    packed = (*outputs[:-1], outputs[-1] // PER_WORD)
    zeros = param('zeros', (groups, *packed), jnp.int32)
    scales = param('scales', (groups, *outputs), jnp.float16)
    lead = x.shape[: x.ndim - self.contracted]
    x = x.astype(self.dtype).reshape(*lead, -1, PER_WORD)
    return _product(x, words, zeros, scales, self.zero_offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(x, words, zeros, scales, zero_offset):
  """[...,in/8,8] against a kernel, whose gradient nobody wants.

  The gradient of x is by values that are made again: kept from the forward
  pass, they would be a dequantized copy of the model.
  """
  values = _values(x, words, zeros, scales, zero_offset)
  # Two axes contracted, not one: joining them would move split inputs.
  contract = ((x.ndim - 1, x.ndim - 2), (0, 1))
  return jax.lax.dot_general(x, values, (contract, ((), ())))


def _product_forward(x, words, zeros, scales, zero_offset):
  y = _product(x, words, zeros, scales, zero_offset)
  return y, (words, zeros, scales)


def _product_backward(zero_offset, packed, gradient):
  values = _values(gradient, *packed, zero_offset)
  outputs = values.ndim - 2
  last = tuple(range(gradient.ndim - outputs, gradient.ndim))
  contract = (last, tuple(range(2, values.ndim)))
  by_x = jax.lax.dot_general(gradient, values, (contract, ((), ())))
  return by_x.swapaxes(-1, -2), None, None, None


_product.defvjp(_product_forward, _product_backward)


def _values(x, words, zeros, scales, zero_offset):
  """A kernel's values in the dtype of what they are multiplied by.

  Not before x is there: all layers' values would not fit. XLA drops a barrier
  before it schedules, but keeps what depends on x: what is added is 0, or all
  of the product is not a number.
  """
  words += jnp.isnan(x.ravel()[0]).astype(words.dtype)
  return dequantized(words, zeros, scales, zero_offset).astype(x.dtype)


def dequantized(words, zeros, scales, zero_offset: int = 1) -> jax.Array:
  """The values of a kernel.

  Args:
    words: [in/8,*out] int32.
    zeros: [groups,*out/8] int32.
    scales: [groups,*out] float.
    zero_offset: what is added to stored zero points.

  Returns:
    [8,in/8,*out] float32: input 8 * i + j is at [j,i].
  """
  outputs = scales.shape[1:]
  grouped = (PER_WORD, len(scales), len(words) // len(scales), *outputs)
  zeros = _nibbles(zeros, zeros.ndim).reshape(scales.shape) + zero_offset
  shifted = _nibbles(words, 0).reshape(grouped) - zeros[:, None]
  values = shifted.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]
  return values.reshape(PER_WORD, *words.shape)


def _nibbles(words, axis: int) -> jax.Array:
  """The 8 values of each word along a new axis."""
  shifts = 4 * jnp.arange(PER_WORD, dtype=words.dtype)
  shifts = jnp.expand_dims(
    shifts, [i for i in range(words.ndim + 1) if i != axis]
  )
  return (jnp.expand_dims(words, axis) >> shifts) & 15
