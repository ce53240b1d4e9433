"""The release's Int4 layout (GPTQ), seen as plain weights or kept packed.

A linear map is stored as

  qweight [in/8,out] int32     8 values of 4 bits along `in`, lowest first
  qzeros  [groups,out/8] int32  zero points less an offset, packed along `out`
  scales  [groups,out]
  g_idx   [in] int32           group of each input
  bias    [out]                all zero where the release has no bias

and stands for weight[o, i] = scales[g, o] * (q[i, o] - zero[g, o]). The offset
is 1, and 0 in files that say `"checkpoint_format": "gptq_v2"`.

Kept, `g_idx` and the zero biases are left out: they say nothing (`implied`).
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_jax.conversion import json_schema, schemas
from qwenvl_jax.conversion.families.qwen_vl.config import ZERO_OFFSETS
from qwenvl_jax.conversion.layout import released_shapes, rules
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.conversion.tensors import Tensor
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.int4 import PER_WORD

# What the release says of its packed weights beside them.
QUANTIZE = 'quantize_config.json'

_PACKED = ('qweight', 'qzeros', 'scales', 'g_idx')

# Of the biases that only the packed layout has; larger ones mean something.
BIAS_TOLERANCE = 1e-5

# The zero point of symmetric weights of 4 bits.
_MIDDLE = 8


def is_quantized(tensors: Mapping[str, Tensor]) -> bool:
  """Whether a released checkpoint is of the Int4 layout."""
  return any(name.endswith('.qweight') for name in tensors)


def _packed_roots(tensors: Mapping[str, Tensor]) -> list[str]:
  suffix = '.qweight'
  return [name.removesuffix(suffix) for name in tensors if suffix in name]


def zero_offset(folder: Path, tensors: Mapping[str, Tensor]) -> int:
  """Finds what is added to the zero points that a checkpoint stores.

  Args:
    folder: with the files that describe its packed weights.
    tensors: in the Int4 layout.

  Raises:
    CheckpointError: the files contradict each other, or all zero points of
      weights that are called symmetric are those of the other format.
  """
  told = {}
  for name, key in ((QUANTIZE, None), ('config.json', 'quantization_config')):
    if not (folder / name).exists():
      continue
    raw = json_schema.read_json(folder / name)
    raw = raw if key is None else raw.get(key)
    if isinstance(raw, dict):
      where = f'{folder / name}' + (f': {key}' if key else '')
      told[name] = json_schema.check(raw, schemas.QUANTIZATION, where)
  formats = {name: x['checkpoint_format'] for name, x in told.items()}
  formats = {name: form for name, form in formats.items() if form}
  if len(set(formats.values())) > 1:
    texts = ' and '.join(f'{name} {form!r}' for name, form in formats.items())
    raise CheckpointError(
      f'{folder}: checkpoint_format is of {texts}: make both say what the '
      'program that quantized the weights wrote'
    )
  form = next(iter(formats.values()), 'gptq')
  if all(x['sym'] is not False for x in told.values()):
    _check_middle(folder, tensors, form)
  return ZERO_OFFSETS[form]


def _check_middle(folder: Path, tensors, form: str) -> None:
  """Refuses symmetric weights whose zero points the other format wrote."""
  ((other, offset),) = ZERO_OFFSETS.items() - {(form, ZERO_OFFSETS[form])}
  word = sum((_MIDDLE - offset) << 4 * i for i in range(PER_WORD))
  word = np.uint32(word).view(np.int32)
  names = [f'{root}.qzeros' for root in _packed_roots(tensors)]
  stored = [tensors[name] for name in names if name in tensors]
  if stored and all(
    (x.read(0, x.shape[0] if x.shape else 1) == word).all() for x in stored
  ):
    raise CheckpointError(
      f'{folder}: all stored zero points are {_MIDDLE - offset}, as '
      f'{other!r} stores symmetric weights, but checkpoint_format is {form!r}: '
      f'write "checkpoint_format": "{other}" into {QUANTIZE} and into '
      'quantization_config of config.json, or "sym": false if they are right'
    )


def dequantized(
  folder: Path,
  tensors: Mapping[str, Tensor],
  config: QwenVLConfig,
) -> dict[str, Tensor]:
  """Gives the tensors of the plain layout, dequantized as they are read.

  Args:
    folder: the checkpoint, which says how zero points are stored.
    tensors: in the Int4 layout.
    config: of the model.

  Returns:
    Released name to tensor; packed weights as float32 [out,in].

  Raises:
    CheckpointError: a packed weight is incomplete, of another bit width, or
      comes with a bias that is not zero and has no place in the model.
  """
  for root in _packed_roots(tensors):
    _check_packed(folder, root, tensors)
  offset, wanted = zero_offset(folder, tensors), released_shapes(rules(config))

  # Several blocks of one weight follow each other, in several threads.
  @functools.lru_cache(maxsize=4)
  def load(root: str) -> _Packed:
    return _load(root, tensors, offset)

  plain = {}
  for name, tensor in _meaningful(tensors, wanted).items():
    root, _, kind = name.rpartition('.')
    if kind == 'qweight':
      plain[f'{root}.weight'] = _weight(root, tensor, load)
    elif kind == 'bias' or f'{root}.qweight' not in tensors:
      plain[name] = tensor
  return plain


def group_size(folder: Path, tensors: Mapping[str, Tensor]) -> int:
  """Finds how many inputs share a scale, in weights that can be kept packed.

  Args:
    folder: the checkpoint, for messages.
    tensors: of a released checkpoint.

  Raises:
    CheckpointError: there are no packed weights, they are damaged, or their
      groups differ or are not of neighbouring inputs.
  """
  roots = _packed_roots(tensors)
  if not roots:
    raise CheckpointError(
      f'{folder} holds no int4 weights (GPTQ): leave out keep_int4; in '
      'training, take finetune/lora.gin instead of qlora.gin'
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
  """Gives the tensors of the Int4 layout that hold something.

  Args:
    tensors: in the Int4 layout, checked by `group_size`.
    config: of the model, with packed kernels.

  Raises:
    CheckpointError: a bias is not zero and has no place in the model.
  """
  left = _meaningful(tensors, released_shapes(rules(config)))
  return {k: x for k, x in left.items() if not k.endswith('.g_idx')}


def _meaningful(tensors: Mapping[str, Tensor], wanted) -> dict[str, Tensor]:
  """The tensors without biases of packed weights that are zero."""
  left = {}
  for name, tensor in tensors.items():
    root, _, kind = name.rpartition('.')
    packed = f'{root}.qweight' in tensors
    if packed and kind == 'bias' and name not in wanted:
      _check_bias(name, tensor)
    else:
      left[name] = tensor
  return left


def implied(
  table: list[Rule], group: int, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields what the Int4 layout has beside the tensors of `kept`.

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


def _check_bias(name: str, tensor: Tensor) -> None:
  largest = float(np.abs(tensor.load().astype(np.float32)).max(initial=0.0))
  if not largest <= BIAS_TOLERANCE:
    raise CheckpointError(
      f'{tensor.file}: {name} goes up to {largest:g}, but the model has no '
      'such bias, and the release has zeros there: dropping it would change '
      'what the model says'
    )


class _Packed(NamedTuple):
  """A packed weight in memory; zero points are [groups,out] int8."""

  words: np.ndarray
  zeros: np.ndarray
  scales: np.ndarray
  groups: np.ndarray

  def rows(self, start: int, stop: int) -> np.ndarray:
    """[stop - start,in] float32: the weights of these outputs."""
    columns = slice(start, stop)
    values = _unpack(np.ascontiguousarray(self.words[:, columns]), 0)
    shifted = values - self.zeros[:, columns][self.groups]
    scales = self.scales[:, columns].astype(np.float32)[self.groups]
    return (scales * shifted).T


def _load(root: str, tensors: Mapping[str, Tensor], offset: int) -> _Packed:
  words, zeros, scales, groups = (
    tensors[f'{root}.{kind}'].load() for kind in _PACKED
  )
  if groups.min(initial=0) < 0 or groups.max(initial=0) >= len(scales):
    raise CheckpointError(
      f'{tensors[f"{root}.g_idx"].file}: {root}.g_idx names groups that '
      f'{root}.scales has not'
    )
  return _Packed(words, _unpack(zeros, 1) + np.int8(offset), scales, groups)


def _check_packed(folder: Path, root: str, tensors) -> None:
  """Checks the dtypes and shapes of a packed weight's tensors."""
  names = [f'{root}.{kind}' for kind in _PACKED]
  absent = [name for name in names if name not in tensors]
  if absent:
    raise CheckpointError(
      f'{folder}: {root}.qweight is there, but {" and ".join(absent)} missing'
    )
  packed, zeros, scales, groups = (tensors[name] for name in names)
  if len(packed.shape) != 2 or len(scales.shape) != 2 or not all(scales.shape):
    raise CheckpointError(
      f'{packed.file}: {root} has qweight {list(packed.shape)} and scales '
      f'{list(scales.shape)}, which are no matrices as 4-bit GPTQ has them'
    )
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


def _weight(root: str, packed: Tensor, load) -> Tensor:
  def read_into(start, rows):
    rows[...] = load(root).rows(start, start + len(rows))

  shape = (packed.shape[1], packed.shape[0] * PER_WORD)
  return Tensor(shape, np.dtype(np.float32), packed.file, read_into)


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
