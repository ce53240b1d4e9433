"""Tensors of a released layout, whatever they are read from.

Every checkpoint is seen as such tensors, by their released names: files hold
them as they are, Orbax arrays in other axes (`orbax_store`), and packed ones
are dequantized as they are read (`gptq`). A dict of them is a model.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from qwenvl_jax.conversion import layout
from qwenvl_jax.conversion.families.foreign import of_names
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.errors import CheckpointError

DTYPES = {
  'bfloat16': ml_dtypes.bfloat16,
  'float16': np.float16,
  'float32': np.float32,
}
# What parameters may be stored as; float64 in released files if it is cast.
FLOATS = tuple(map(np.dtype, (*DTYPES.values(), np.float64)))


@dataclasses.dataclass(frozen=True)
class Tensor:
  """What a tensor of a checkpoint is, and how to get its values.

  Attributes:
    shape: of the tensor.
    dtype: of the tensor.
    file: where it is stored, for messages.
    read_into: (start, rows) fills `rows` [n,*shape[1:]], C-ordered, with those
      from `start` on; raises CheckpointError where the file is damaged. Tensors
      without axes have one row.
    offset: of its first byte in the file; 0 if reading computes the values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path
  read_into: Callable[[int, np.ndarray], None]
  offset: int = 0

  @classmethod
  def of(cls, array: np.ndarray, file: Path) -> 'Tensor':
    """Gives an array in memory as a tensor."""

    def read_into(start, rows):
      rows[...] = array.reshape(-1, *array.shape[1:])[start : start + len(rows)]

    return cls(array.shape, array.dtype, file, read_into)

  def read(self, start: int, stop: int) -> np.ndarray:
    """Reads rows `start` to `stop`, C-ordered."""
    rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
    self.read_into(start, rows)
    return rows

  def load(self) -> np.ndarray:
    """Reads the whole tensor."""
    rows = self.read(0, self.shape[0] if self.shape else 1)
    return rows.reshape(self.shape)

  def cast(self, name: str, dtype: np.dtype) -> 'Tensor':
    """Gives it in another dtype.

    Args:
      name: of the tensor, for messages.
      dtype: see `narrow`; reading raises CheckpointError for its error.
    """

    def read_into(start, rows):
      values = self.read(start, start + len(rows))
      try:
        rows[...] = narrow(name, values, dtype)
      except OverflowError as error:
        raise CheckpointError(f'{self.file}: {error}') from error

    if self.dtype == dtype:
      return self
    return dataclasses.replace(self, dtype=np.dtype(dtype), read_into=read_into)

  def grown(self, count: int, seed: tuple[int, ...]) -> 'Tensor':
    """Gives it with new rows after the stored ones.

    Args:
      count: of all rows.
      seed: of the new ones, drawn from a normal distribution with the
        release's deviation of 0.02.
    """

    def read_into(start, rows):
      stored = min(max(self.shape[0] - start, 0), len(rows))
      if stored:
        self.read_into(start, rows[:stored])
      if stored < len(rows):
        random = np.random.default_rng((*seed, start))
        rows[stored:] = random.normal(0, 0.02, rows[stored:].shape)

    shape = (count, *self.shape[1:])
    return dataclasses.replace(self, shape=shape, read_into=read_into)


def cast_all(tensors: Mapping[str, Tensor], dtype) -> dict[str, Tensor]:
  """Casts all tensors but those of packed kernels."""
  return {
    name: tensor if layout.is_packed(name) else tensor.cast(name, dtype)
    for name, tensor in tensors.items()
  }


def check_tensors(
  tensors: Mapping[str, Tensor], table: Iterable[Rule], where: str
) -> None:
  """Checks that a checkpoint holds what it must hold.

  Args:
    tensors: all of the checkpoint.
    table: what they must be.
    where: the checkpoint, for messages.

  Raises:
    CheckpointError: tensors are missing, unknown or misshapen.
  """
  expected = layout.released_shapes(table)
  family = of_names(tensors.keys() - expected.keys())
  if family is not None and not expected.keys() <= tensors.keys():
    where += f' looks like {family} by its tensors'
  layout.check_shapes(
    expected, {name: x.shape for name, x in tensors.items()}, where
  )


def check_dtypes(
  tensors: Mapping[str, Tensor], table: Iterable[Rule], cast: bool
) -> None:
  """Checks that parameters are floats that can be stacked.

  Args:
    tensors: of a model, those of packed kernels among them.
    table: of the model.
    cast: whether all will be cast to one dtype.

  Raises:
    CheckpointError: a tensor is of another dtype, or of another one than those
      of other layers.
  """
  known = FLOATS if cast else FLOATS[: len(DTYPES)]
  for rule in table:
    first, *_ = names = rule.released_names()
    for name in names:
      tensor, packed = tensors[name], layout.is_packed(name)
      if tensor.dtype not in known and not packed:
        raise CheckpointError(
          f'{tensor.file}: tensor {name} has dtype {tensor.dtype}, which is '
          f'not supported for parameters ({", ".join(DTYPES)})'
        )
      if tensor.dtype != tensors[first].dtype and (packed or not cast):
        raise CheckpointError(
          f'{tensor.file}: tensor {name} is {tensor.dtype}, but {first} is '
          f'{tensors[first].dtype}: layers are stacked and need one dtype. '
          'Choose one for all with --dtype'
        )


def narrow(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Casts to a released dtype, refusing values that do not fit.

  Args:
    name: of the tensor, for the error.
    array: of any shape.
    dtype: to cast to.

  Raises:
    OverflowError: a finite value became infinite (float16).
  """
  if array.dtype == dtype:
    return array
  with np.errstate(over='ignore'):  # Reported below, by name.
    result = array.astype(dtype)
  if np.dtype(dtype) == np.float16:
    finite = np.isfinite(array.astype(np.float32))
    if not np.isfinite(result[finite]).all():
      raise OverflowError(
        f'{name} has values beyond float16 (65504): choose bfloat16'
      )
  return result
