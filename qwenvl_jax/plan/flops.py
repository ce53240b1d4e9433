"""FLOPs of a compiled program: products, convolutions, attention kernels.

Of kernels that wait for memory, also the bytes.
"""

import functools
import json
import math
import re

import numpy as np

from qwenvl_jax.plan.hlo import (
  Computation,
  Instruction,
  Program,
  Shape,
  walk,
)


def product_flops(program: Program) -> float:
  """FLOPs of all matrix products and convolutions that run."""
  return sum(
    visit.times * _FLOPS[visit.instruction.opcode](
      visit.instruction, visit.computation
    )
    for visit in walk(program)
    if visit.instruction.opcode in _FLOPS
  )  # fmt: skip


def _numbers(text: str | None) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text or '')]


def _dot(dot: Instruction, computation: Computation) -> float:
  left = computation.instructions[dot.operands[0]].shapes[0].dims
  contracted = _numbers(dot.attribute(r'lhs_contracting_dims=\{([\d,]*)\}'))
  return 2.0 * dot.shapes[0].size * math.prod(left[n] for n in contracted)


def _convolution(conv: Instruction, computation: Computation) -> float:
  """FLOPs without those on padding, as XLA's own analysis counts them.

  The TPU compiler writes every matrix product as a convolution. Batch
  dimensions are spatial ones there, of which padding and dilation leave one
  valid pair of positions for each output.
  """
  labels = conv.attribute(r'dim_labels=(\w+->\w+)')
  left_labels, right_labels, out_labels = re.split('_|->', labels)
  left, right = (
    computation.instructions[name].shapes[0].dims for name in conv.operands[:2]
  )
  out = conv.shapes[0].dims
  window = _window(conv.attribute(r'window=\{([^}]*)\}') or '')
  valid = 1
  for number in range(sum(label.isdigit() for label in left_labels)):
    label = str(number)
    valid *= _valid_pairs(
      left[left_labels.index(label)],
      right[right_labels.index(label)],
      out[out_labels.index(label)],
      *(values[number] if values else default for values, default in window),
    )
  batch_groups = _numbers(conv.attribute(r'batch_group_count=(\d+)')) or [1]
  return (
    2.0
    * valid
    * (left[left_labels.index('b')] // batch_groups[0])
    * right[right_labels.index('i')]
    * right[right_labels.index('o')]
  )


def _window(text: str) -> list[tuple[list, int | tuple[int, int]]]:
  """(a value a dimension, default) of stride, padding, dilations, reversal."""
  fields = dict(re.findall(r'(\w+)=([\w\-]+)', text))

  def numbers(name):
    return [int(n) for n in fields[name].split('x')] if name in fields else []

  # Padding may be negative: 'low_high' for each dimension.
  padding = [
    int(pair.split('_')[0])
    for pair in fields['pad'].split('x')
  ] if 'pad' in fields else []  # fmt: skip
  return [
    (numbers('stride'), 1),
    (padding, 0),
    (numbers('lhs_dilate'), 1),
    (numbers('rhs_dilate'), 1),
  ]


@functools.cache
def _valid_pairs(left, right, out, stride, low, left_dilate, right_dilate):
  """Pairs of an output's and a kernel's position that meet an input."""
  place = (
    np.arange(out)[:, None] * stride
    - low
    + np.arange(right)[None, :] * right_dilate
  )
  inside = (place >= 0) & (place <= (left - 1) * left_dilate)
  return int(np.count_nonzero(inside & (place % left_dilate == 0)))


_FLOPS = {'dot': _dot, 'convolution': _convolution}

# Products of [T,H] with [H,S] (or like it) in each of splash attention's
# kernels: scores and values; scores, dP and dQ; scores, dP, dV and dK; and one
# more where the kernel of dK and dV also makes dQ.
_SPLASH = re.compile(r'splash_m[hq]a_(fwd|dq|dkv)')

_DECODE = re.compile(r'^decode_attention\b')

# The decoder's attention is causal, that of the vision transformer is not.
_CAUSAL = re.compile(r'\bdecoder\b')


def kernel_flops(program: Program) -> tuple[float, list[str]]:
  """FLOPs of the attention kernels that run, which XLA does not count.

  A kernel skips blocks in which nobody sees anybody: of a causal row, those
  above the diagonal. What segments rule out is not known to the compiler.

  Returns:
    (FLOPs, names of kernels without a formula).
  """
  total, unknown = 0.0, set()
  for visit in walk(program):
    call = visit.instruction
    if call.opcode == 'custom-call' and '"tpu_custom_call"' in call.rest:
      one = kernel_call_flops(call, visit.computation)
      if one is None:
        unknown.add(call.name)
      total += visit.times * (one or 0.0)
  return total, sorted(unknown)


def kernel_call_flops(
  call: Instruction, computation: Computation
) -> float | None:
  """FLOPs of one call of an attention kernel; None for anything else."""
  if is_decode_attention(call):
    # Scores and values, two FLOPs for each key of a full cache.
    return 4.0 * _keys(call, computation).size
  match = _SPLASH.search(call.name) or _SPLASH.search(call.op_name)
  if '"tpu_custom_call"' not in call.rest or not match:
    return None
  return _splash(
    match[1], call, computation, bool(_CAUSAL.search(call.op_name))
  )


def is_decode_attention(call: Instruction) -> bool:
  """Whether this is `model.decode_kernel`."""
  return '"tpu_custom_call"' in call.rest and bool(_DECODE.search(call.name))


def decode_attention_bytes(
  call: Instruction, computation: Computation
) -> float:
  """Bytes that a call of `model.decode_kernel` reads from a full cache."""
  rows, _, size = _keys(call, computation).dims[:3]
  return sum(
    operand.bytes
    for operand in computation.operands(call)
    if operand.shapes[0].dims[::2][:2] == (rows, size)
  )


def _keys(call, computation) -> Shape:
  """The first operand [B,N,S,H] of `model.decode_kernel`."""
  return next(
    operand.shapes[0]
    for operand in computation.operands(call)
    if len(operand.shapes[0].dims) == 4
  )


def _splash(kind, call, computation, is_causal) -> float:
  arrays = [
    operand.shapes[0]
    for operand in computation.operands(call)
    if operand.shapes[0].dtype in ('bf16', 'f32')
    and len(operand.shapes[0].dims) > 2
  ]
  queries, keys = arrays[0], arrays[1]
  blocks = _blocks(call)
  products = {'fwd': 2, 'dq': 3, 'dkv': 4}[kind]
  if kind == 'dkv' and blocks.get('use_fused_bwd_kernel'):
    products += 1
  suffix = '' if kind == 'fwd' else f'_{kind}'
  lengths = queries.dims[-2], keys.dims[-2]
  share = 1.0
  if is_causal:
    share = _causal_share(
      *lengths,
      blocks.get(f'block_q{suffix}') or lengths[0],
      blocks.get(f'block_kv{suffix}') or lengths[1],
    )
  return 2.0 * products * share * queries.size * lengths[1]


def _blocks(call: Instruction) -> dict:
  """The kernel's block sizes, which it writes down for the profiler."""
  match = re.search(r'"xprof_metadata":"((?:[^"\\]|\\.)*)"', call.rest)
  return json.loads(match[1].replace('\\"', '"')) if match else {}


def _causal_share(queries, keys, block_queries, block_keys) -> float:
  """Share of the blocks that hold a pair on or below the diagonal.

  >>> _causal_share(1024, 1024, 512, 512)
  0.75
  """
  columns = -(-keys // block_keys)
  rows = -(-queries // block_queries)
  visible = sum(
    min(columns, -(-(row + 1) * block_queries // block_keys))
    for row in range(rows)
  )
  return visible / (rows * columns)
