"""Norms and projections shared by the towers.

Parameters carry logical axis names where they are born; `sharding.py` maps
them to mesh axes. Matrix products run in `dtype`, norms in float32.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qwenvl_jax.fsdp import multiply
from qwenvl_jax.model.int4 import Int4Kernel
from qwenvl_jax.model.int8 import Int8Kernel
from qwenvl_jax.model.lora import LoraConfig, raised, reduced
from qwenvl_jax.model.remat import NORM, keep

# Of tables: tokens, positions, queries.
default_init = nn.initializers.normal(0.02)

# Rows that a TPU multiplies at least; to its compiler, one row is no product.
_SUBLANES = 8


class LayerNorm(nn.Module):
  """Layer norm over the last axis: float32 inside, dtype of x outside."""

  epsilon: float
  param_dtype: Any = jnp.float32
  scale_init: Callable = nn.initializers.ones

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1:]
    part = nn.with_logical_partitioning
    scale = self.param(
      'scale', part(self.scale_init, ('norm',)), shape, self.param_dtype
    )
    bias = self.param(
      'bias', part(nn.initializers.zeros, ('norm',)), shape, self.param_dtype
    )
    h = x.astype(jnp.float32)
    mean = keep(jnp.mean(h, axis=-1), NORM)
    if x.dtype == jnp.float32:
      variance = jnp.mean(jnp.square(h - mean[..., None]), axis=-1)
      variance = keep(variance, NORM)
    else:
      # In one pass. What cancels is a float32's rounding of the mean's square,
      # far below what x was rounded by.
      variance = jnp.mean(jnp.square(h), axis=-1) - jnp.square(mean)
      variance = jnp.maximum(keep(variance, NORM), 0)
    h = h - mean[..., None]
    h = h * jax.lax.rsqrt(variance + self.epsilon)[..., None]
    h = h * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return h.astype(x.dtype)


class RMSNorm(nn.Module):
  """RMS norm; as in the release, cast back before the weight is applied."""

  epsilon: float
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param(
      'scale',
      nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
      x.shape[-1:],
      self.param_dtype,
    )
    h = x.astype(jnp.float32)
    square = keep(jnp.mean(jnp.square(h), axis=-1), NORM)
    h = h * jax.lax.rsqrt(square + self.epsilon)[..., None]
    return h.astype(x.dtype) * scale.astype(x.dtype)


class Projection(nn.Module):
  """A linear map given by an einsum, e.g. 'BTD,DNH->BTNH'.

  Attributes:
    equation: input, kernel and output axes; the input's last axes are the
      kernel's first.
    shape: of the kernel.
    axes: logical axis names of the kernel.
    bias_axes: how many trailing axes of the output carry a bias; 0 for none.
    kernel_init: None for a normal distribution scaled by the inputs' number.
    int4_group: not None if the kernel is packed, see `Int4Kernel`.
    int4_zero_offset: of a packed kernel, see there.
    outputs_first: whether the kernel is stored with its outputs first, as
      released, for inference.
    int8: whether a kernel with its outputs first is held at 8 bits, see
      `Int8Kernel`.
    lora: whether projections are adapted, and which.
  """

  equation: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  bias_axes: int = 0
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  kernel_init: Callable | None = None
  int4_group: int | None = None
  int4_zero_offset: int = 1
  outputs_first: bool = False
  int8: bool = False
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, low=None, ranks=None):
    """Maps the last axes of an array.

    Args:
      x: [...,*in].
      low: [...,R] that `lora.Shared` made of x.
      ranks: see `lora.reduced`.

    Returns:
      [...,*out].
    """
    _, weights, outputs = re.split(',|->', self.equation)
    contracted = len(set(weights) - set(outputs))
    if self.int4_group is None:
      y = self._multiply(x, contracted)
    else:
      y = Int4Kernel(
        self.shape,
        self.axes,
        contracted,
        self.int4_group,
        self.dtype,
        self.int4_zero_offset,
        name='kernel',
      )(x)
    if self.bias_axes:
      bias = self.param(
        'bias',
        nn.with_logical_partitioning(
          nn.initializers.zeros, self.axes[-self.bias_axes :]
        ),
        self.shape[-self.bias_axes :],
        self.param_dtype,
      )
      y = add_bias(y, bias.astype(self.dtype))
    inputs, outputs = slice(contracted), slice(contracted, None)
    if self.lora is not None and self.lora.adapts(self.path):
      low = reduced(self, x, self.shape[inputs], self.axes[inputs], ranks)
    if low is not None:
      y = y + raised(self, low, self.shape[outputs], self.axes[outputs])
    return y

  def _multiply(self, x, contracted: int):
    # 0.016 at the release's width of 4096, where the release has 0.02; small
    # models need more to learn fast.
    scale = math.prod(self.shape[:contracted]) ** -0.5
    shape, axes = self.shape, self.axes
    if self.outputs_first:
      shape = outputs_first(shape, contracted)
      axes = outputs_first(axes, contracted)
      if self.int8:
        kernel = Int8Kernel(shape, axes, contracted, self.dtype, name='kernel')
        return kernel(x)
    kernel = self.param(
      'kernel',
      nn.with_logical_partitioning(
        self.kernel_init or nn.initializers.normal(scale), axes
      ),
      shape,
      self.param_dtype,
    )
    return multiply(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      axes,
      contracted,
      self.outputs_first,
    )


def gelu(x: jax.Array) -> jax.Array:
  """Applies the exact GELU.

  float32 is `jax.nn.gelu`. What that makes of bfloat16 has several roundings,
  and a branch that a TPU computes as a mask of its own: here, bfloat16 is
  computed in float32 and rounded once.

  Args:
    x: of any shape, float32 or bfloat16.

  Returns:
    The same shape and dtype.
  """
  if x.dtype == jnp.float32:
    return jax.nn.gelu(x, approximate=False)
  return _gelu(x)


def _normal_cdf(x):
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_vjp
def _gelu(x):
  h = x.astype(jnp.float32)
  return (h * _normal_cdf(h)).astype(x.dtype)


def _gelu_backward(x, gradient):
  h = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * jnp.square(h)) / math.sqrt(2 * math.pi)
  slope = _normal_cdf(h) + h * density
  return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
  """Adds a bias to every row.

  Its gradient in bfloat16 is a product with ones: left to itself, a TPU sums
  over rows in layouts of heads, which takes several times what reading does.
  The axes stay apart, as in `fsdp.multiply`.

  Args:
    y: [...,*out].
    bias: [*out], of the same dtype.

  Returns:
    [...,*out].
  """
  if y.dtype != jnp.bfloat16:
    return y + bias
  return _add_bias(y, bias)


@jax.custom_vjp
def _add_bias(y, bias):
  return y + bias


def _add_bias_backward(bias, gradient):
  lead = gradient.ndim - bias.ndim
  ones = jnp.ones((_SUBLANES, *gradient.shape[:lead]), gradient.dtype)
  return gradient, jnp.tensordot(ones, gradient, lead)[0]


_add_bias.defvjp(lambda y, bias: (y + bias, bias), _add_bias_backward)


def outputs_first(axes: tuple, contracted: int) -> tuple:
  """Moves the first `contracted` axes of a kernel to its end."""
  return (*axes[contracted:], *axes[:contracted])
