"""Kernels of 8 bits with a scale for each output, for inference.

A kernel [*out,*in] is two arrays:

  values  [*out,*in] int8
  scales  [*out] float32

and stands for values * scales. Half the bytes of bfloat16 are read for a token.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.fsdp import gathered, multiply
from qwenvl_jax.model.stacking import inputs_of, is_plain_kernel

_MAX = 127  # The largest int8 whose negative is one, too.


class Int8Kernel(nn.Module):
  """A kernel of 8 bits, multiplied by.

  Attributes:
    shape: [*out,*in].
    axes: logical axis names of these.
    contracted: how many of its axes are inputs.
    dtype: of the product.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  contracted: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    """[...,*in] to [...,*out]."""
    outputs = len(self.shape) - self.contracted

    def param(name, init, count, dtype):
      axes = self.axes[:count]
      init = nn.with_logical_partitioning(init, axes)
      return self.param(name, init, self.shape[:count], dtype), axes

    values, axes = param(
      'values', nn.initializers.zeros, len(self.shape), jnp.int8
    )
    y = multiply(
      x.astype(self.dtype),
      values.astype(self.dtype),
      axes,
      self.contracted,
      outputs_first=True,
    )
    scales = gathered(
      *param('scales', nn.initializers.ones, outputs, 'float32')
    )
    return (y.astype(jnp.float32) * scales).astype(self.dtype)


def quantize(kernel, contracted: int):
  """Rounds a kernel to 8 bits by the largest magnitude of each output.

  Args:
    kernel: [*out,*in] float, of NumPy or jax.
    contracted: how many of its axes are inputs.

  Returns:
    ([*out,*in] int8 values, [*out] float32 scales), of NumPy or jax.
  """
  xp = np if isinstance(kernel, np.ndarray) else jnp
  axes = tuple(range(-contracted, 0))
  wide = kernel.astype(np.float32)
  scales = xp.max(xp.abs(wide), axis=axes, keepdims=True) / np.float32(_MAX)
  # An output of zeros stays one.
  scales = xp.where(scales > 0, scales, np.float32(1))
  values = xp.round(wide / scales).astype(np.int8)
  return values, scales.reshape(scales.shape[:-contracted])


def quantize_params(params: dict) -> dict:
  """Rounds the decoder's kernels, blocks and head, to 8 bits.

  Args:
    params: for inference (`model.stacking`), of jax arrays.

  Returns:
    The same tree with `values` and `scales` in place of each plain kernel.
  """
  rounded = jax.jit(quantize, static_argnums=1)

  def convert(tree: dict, path: str) -> dict:
    result = {}
    for name, x in tree.items():
      here = f'{path}/{name}'
      if isinstance(x, dict):
        result[name] = convert(x, here)
      elif is_plain_kernel(here):
        values, scales = rounded(x, inputs_of(here))
        result[name] = {'values': values, 'scales': scales}
      else:
        result[name] = x
    return result

  return params | {'decoder': convert(params['decoder'], 'decoder')}
