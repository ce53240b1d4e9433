"""The release's Int4 layout (GPTQ), seen as plain weights or kept packed.

A linear map is stored as

  qweight [in/8,out] int32     8 values of 4 bits along `in`, lowest first
  qzeros  [groups,out/8] int32  zero points less one, packed along `out`
  scales  [groups,out]
  g_idx   [in] int32           group of each input
  bias    [out]                all zero where the release has no bias

and stands for weight[o, i] = scales[g, o] * (q[i, o] - zero[g, o]).

Kept, `g_idx` and the zero biases are left out: they say nothing (`implied`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_jax.conversion.blocks import Block
from qwenvl_jax.conversion.layout import (
  Rule,
  is_packed,
  released_shapes,
  rules,
)
from qwenvl_jax.conversion.reader import Tensor
from qwenvl_jax.conversion.source import OrbaxSource, Source
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.int4 import PER_WORD

_PACKED = ('qweight', 'qzeros', 'scales', 'g_idx')

# Of the biases that only the packed layout has; larger ones mean something.
BIAS_TOLERANCE = 1e-5


def is_quantized(tensors: Mapping[str, Tensor]) -> bool:
  """Whether a released checkpoint is of the Int4 layout."""
  return any(name.endswith('.qweight') for name in tensors)


def dequantized(
  folder: Path, tensors: Mapping[str, Tensor], config: QwenVLConfig
) -> dict[str, Tensor]:
  """The tensors of the plain layout, dequantized as they are read.

  Args:
    folder: the checkpoint, for messages.
    tensors: in the Int4 layout.
    config: of the model.

  Returns:
    Released name to tensor; packed weights as float32 [out,in].

  Raises:
    CheckpointError: a packed weight is incomplete, of another bit width, or
      comes with a bias that is not zero and has no place in the model.
  """
  plain = {}
  wanted = released_shapes(rules(config))

  # Several blocks of one weight follow each other, in several threads.
  @functools.lru_cache(maxsize=4)
  def parts(root: str) -> _Parts:
    return _load(root, tensors)

  for name, tensor in tensors.items():
    root, _, kind = name.rpartition('.')
    if f'{root}.qweight' not in tensors:
      plain[name] = tensor
    elif kind == 'qweight':
      plain[f'{root}.weight'] = _weight(folder, root, tensors, parts)
    elif kind == 'bias':
      if name in wanted:
        plain[name] = tensor
      else:
        _check_bias(name, tensor)
  return plain


def group_size(folder: Path, tensors: Mapping[str, Tensor]) -> int:
  """How many inputs share a scale, in weights that can be kept packed.

  Args:
    folder: the checkpoint, for messages.
    tensors: of a released checkpoint.

  Raises:
    CheckpointError: there are no packed weights, they are damaged, or their
      groups differ or are not of neighbouring inputs.
  """
  roots = [
    name.removesuffix('.qweight')
    for name in tensors
    if name.endswith('.qweight')
  ]
  if not roots:
    raise CheckpointError(
      f'{folder} holds no int4 weights (GPTQ): leave out keep_int4'
    )
  sizes = {}
  for root in roots:
    _check_packed(folder, root, tensors)
    scales, groups = tensors[f'{root}.scales'], tensors[f'{root}.g_idx']
    inputs = groups.shape[0]
    sizes[root] = size = inputs // scales.shape[0]
    if not np.array_equal(groups.load(), _order(inputs, size)):
      raise CheckpointError(
        f'{groups.file}: {root}.g_idx puts inputs into groups in an order of '
        'its own (desc_act): such weights can be dequantized, but not kept at '
        '4 bits. Leave out keep_int4'
      )
  first, *_ = roots
  for root in roots:
    if sizes[root] != sizes[first]:
      raise CheckpointError(
        f'{folder}: {root} has a scale for each {sizes[root]} inputs, {first} '
        f'for each {sizes[first]}: such weights can be dequantized, but not '
        'kept at 4 bits. Leave out keep_int4'
      )
  return sizes[first]


def _order(inputs: int, group: int) -> np.ndarray:
  """The group of each input where neighbours are together."""
  return np.arange(inputs, dtype=np.int32) // np.int32(group)


def kept(
  tensors: Mapping[str, Tensor], config: QwenVLConfig
) -> dict[str, Tensor]:
  """The tensors of the Int4 layout that hold something.

  Args:
    tensors: in the Int4 layout, checked by `group_size`.
    config: of the model, with packed kernels.

  Raises:
    CheckpointError: a bias is not zero and has no place in the model.
  """
  wanted = released_shapes(rules(config))
  left = {}
  for name, tensor in tensors.items():
    root, _, kind = name.rpartition('.')
    if name in wanted or f'{root}.qweight' not in tensors:
      left[name] = tensor
    elif kind == 'bias':
      _check_bias(name, tensor)
  return left


def implied(
  table: list[Rule], group: int, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """What the Int4 layout has beside the tensors of `kept`.

  Args:
    table: of a model with packed kernels.
    group: how many inputs share a scale.
    dtype: of biases.

  Yields:
    Released name and values.
  """
  shapes = released_shapes(table)
  for name, shape in shapes.items():
    root, _, kind = name.rpartition('.')
    if kind == 'qweight':
      words, outputs = shape
      yield f'{root}.g_idx', _order(words * PER_WORD, group)
      if f'{root}.bias' not in shapes:
        yield f'{root}.bias', np.zeros(outputs, dtype)


@dataclasses.dataclass(frozen=True)
class DequantizedSource(Source):
  """A checkpoint with packed kernels as one of float32 kernels."""

  source: OrbaxSource

  @property
  def dtypes(self) -> dict[str, np.dtype]:
    dtypes = {}
    for path, dtype in self.source.dtypes.items():
      if is_packed(path):
        path, dtype = path.rpartition('/')[0], np.dtype(np.float32)
      dtypes[path] = dtype
    return dtypes

  def read(self, block: Block) -> list[np.ndarray]:
    if block.paths[0] in self.source.dtypes:
      return self.source.read(block)
    return [self._kernel(path, block) for path in block.paths]

  def _kernel(self, path: str, block: Block) -> np.ndarray:
    """Blocks are cut along outputs and layers, never along inputs."""
    rank = len(self.source.shapes[f'{path}/words'])
    layers, outputs = block.box[0], block.box[2 - rank :]

    def part(kind, outputs):
      name = f'{path}/{kind}'
      rows = slice(0, self.source.shapes[name][1])
      cut = dataclasses.replace(
        block, paths=(name,), box=(layers, rows, *outputs)
      )
      return self.source.read(cut)[0]

    words, scales = part('words', outputs), part('scales', outputs)
    packed = slice(0, self.source.shapes[f'{path}/zeros'][-1])
    zeros = part('zeros', (*outputs[:-1], packed))
    zeros = (_unpack(zeros, rank - 1) + np.int8(1))[..., outputs[-1]]
    values = _unpack(words, 1)
    group = values.shape[1] // scales.shape[1]
    shifted = values - np.repeat(zeros, group, axis=1)
    scales = np.repeat(scales.astype(np.float32), group, axis=1)
    return (scales * shifted).reshape(block.box_shape)


def _check_bias(name: str, tensor: Tensor) -> None:
  largest = float(np.abs(tensor.load().astype(np.float32)).max(initial=0.0))
  if not largest <= BIAS_TOLERANCE:
    raise CheckpointError(
      f'{tensor.file}: {name} goes up to {largest:g}, but the model has no '
      'such bias, and the release has zeros there: dropping it would change '
      'what the model says'
    )


class _Parts(NamedTuple):
  """A packed weight in memory."""

  words: np.ndarray
  zeros: np.ndarray
  scales: np.ndarray
  groups: np.ndarray


def _load(root: str, tensors: Mapping[str, Tensor]) -> _Parts:
  words, zeros, scales, groups = (
    tensors[f'{root}.{kind}'].load() for kind in _PACKED
  )
  if groups.min(initial=0) < 0 or groups.max(initial=0) >= len(scales):
    raise CheckpointError(
      f'{tensors[f"{root}.g_idx"].file}: {root}.g_idx names groups that '
      f'{root}.scales has not'
    )
  return _Parts(words, _unpack(zeros, 1) + np.int8(1), scales, groups)


def _check_packed(folder: Path, root: str, tensors) -> None:
  """Checks the dtypes and shapes of a packed weight's tensors."""
  names = [f'{root}.{kind}' for kind in _PACKED]
  absent = [name for name in names if name not in tensors]
  if absent:
    raise CheckpointError(
      f'{folder}: {root}.qweight is there, but {" and ".join(absent)} missing'
    )
  packed, zeros, scales, groups = (tensors[name] for name in names)
  inputs, outputs = packed.shape[0] * PER_WORD, packed.shape[1]
  expected = {
    names[0]: (packed, np.int32, packed.shape),
    names[1]: (zeros, np.int32, (scales.shape[0], outputs // PER_WORD)),
    names[2]: (scales, scales.dtype, (scales.shape[0], outputs)),
    names[3]: (groups, np.int32, (inputs,)),
  }
  for name, (tensor, dtype, shape) in expected.items():
    if tensor.shape != shape or tensor.dtype != dtype:
      raise CheckpointError(
        f'{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}, not '
        f'{np.dtype(dtype)} {list(shape)} as 4-bit GPTQ has it'
      )


def _weight(folder, root, tensors, parts) -> Tensor:
  _check_packed(folder, root, tensors)
  packed = tensors[f'{root}.qweight']
  inputs, outputs = packed.shape[0] * PER_WORD, packed.shape[1]

  def read(start: int, stop: int) -> np.ndarray:
    p, columns = parts(root), slice(start, stop)
    values = _unpack(np.ascontiguousarray(p.words[:, columns]), 0)
    shifted = values - p.zeros[:, columns][p.groups]
    scales = p.scales[:, columns].astype(np.float32)[p.groups]
    return np.ascontiguousarray((scales * shifted).T)

  return Tensor((outputs, inputs), np.dtype(np.float32), packed.file, read)


def _unpack(words: np.ndarray, axis: int) -> np.ndarray:
  """int32 words to eight 4-bit values each along an axis, as int8."""
  octets = words.view(np.uint32)
  nibbles = [
    ((octets >> (4 * i)) & 15).astype(np.int8) for i in range(PER_WORD)
  ]
  stacked = np.stack(nibbles, axis=axis + 1)
  shape = list(words.shape)
  shape[axis] *= PER_WORD
  return stacked.reshape(shape)
