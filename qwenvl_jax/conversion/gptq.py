"""The release's Int4 layout (GPTQ): packed weights seen as plain ones.

A linear map is stored as

  qweight [in/8,out] int32     8 values of 4 bits along `in`, lowest first
  qzeros  [groups,out/8] int32  zero points less one, packed along `out`
  scales  [groups,out]
  g_idx   [in] int32           group of each input
  bias    [out]                all zero where the release has no bias

and stands for weight[o, i] = scales[g, o] * (q[i, o] - zero[g, o]).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_jax.conversion.layout import released_shapes, rules
from qwenvl_jax.conversion.reader import Tensor
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig

_PACKED = ('qweight', 'qzeros', 'scales', 'g_idx')
_PER_WORD = 8  # Values of 4 bits in 32.

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


def _weight(folder, root, tensors, parts) -> Tensor:
  names = [f'{root}.{kind}' for kind in _PACKED]
  absent = [name for name in names if name not in tensors]
  if absent:
    raise CheckpointError(
      f'{folder}: {root}.qweight is there, but {" and ".join(absent)} missing'
    )
  packed, zeros, scales, groups = (tensors[name] for name in names)
  inputs, outputs = packed.shape[0] * _PER_WORD, packed.shape[1]
  expected = {
    names[0]: (packed, np.int32, packed.shape),
    names[1]: (zeros, np.int32, (scales.shape[0], outputs // _PER_WORD)),
    names[2]: (scales, scales.dtype, (scales.shape[0], outputs)),
    names[3]: (groups, np.int32, (inputs,)),
  }
  for name, (tensor, dtype, shape) in expected.items():
    if tensor.shape != shape or tensor.dtype != dtype:
      raise CheckpointError(
        f'{tensor.file}: {name} is {tensor.dtype} {list(tensor.shape)}, not '
        f'{np.dtype(dtype)} {list(shape)} as 4-bit GPTQ has it'
      )

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
    ((octets >> (4 * i)) & 15).astype(np.int8) for i in range(_PER_WORD)
  ]
  stacked = np.stack(nibbles, axis=axis + 1)
  shape = list(words.shape)
  shape[axis] *= _PER_WORD
  return stacked.reshape(shape)
