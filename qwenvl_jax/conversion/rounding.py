"""Kernels rounded to 8 bits on their devices, one after the other as they come.

Beside what was rounded, one kernel as it is stored is there at a time.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax

from qwenvl_jax.conversion.loader import Finish
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.int8 import quantize
from qwenvl_jax.model.stacking import inputs_of, is_plain_kernel


def as_stored(config: QwenVLConfig) -> QwenVLConfig:
  """The same model before its kernels are rounded to 8 bits."""
  decoder = dataclasses.replace(config.decoder, int8=False)
  return config.replace(decoder=decoder)


def finish(
  config: QwenVLConfig, placements: Mapping[str, jax.sharding.Sharding]
) -> Finish:
  """What becomes of each parameter that was read.

  Args:
    config: says whether kernels are rounded.
    placements: path to where a parameter goes, of those that are placed.
  """

  def keep(path: str, array: jax.Array) -> dict[str, jax.Array]:
    if not (config.decoder.int8 and is_plain_kernel(path)):
      return {path: array}
    names = f'{path}/values', f'{path}/scales'
    places = tuple(placements.get(name) for name in names)
    rounded = _rounded(inputs_of(path), places)(array)
    return dict(zip(names, rounded, strict=True))

  return keep


@functools.lru_cache
def _rounded(inputs: int, places: tuple):
  """Jitted `quantize` of a kernel with so many axes of inputs."""
  return jax.jit(
    lambda kernel: quantize(kernel, inputs),
    out_shardings=None if None in places else places,
  )
