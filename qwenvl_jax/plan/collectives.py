"""What a compiled program sends between chips.

Three ways to run beside computation occur in scheduled TPU programs: pairs of
`-start` and `-done`; fusions that carry a chain of one collective's parts along
with their own work, from `AsyncCollectiveStart` to `AsyncCollectiveDone`; and
asynchronous wrappers. A reduce-scatter may stand there as itself or as a fusion
around an all-reduce of which each chip keeps a part.
"""

import dataclasses
import math
import re

from qwenvl_jax.plan.hlo import Computation, Instruction, Program

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective, where the program begins it.

  Attributes:
    kind: one of `KINDS`.
    bytes: of the whole array on one chip: what an all-gather makes, what a
      reduction starts from.
    dtype: of the array that is largest.
    group: number of chips that take part.
    colors: rings that it is spread over; 0 where the compiler does not say.
    where: `op_name` of the computation that asked for it.
    crosses_slices: whether it goes over the data center network.
  """

  kind: str
  bytes: float
  dtype: str
  group: int
  colors: int
  where: str
  crosses_slices: bool = False

  @property
  def wire_bytes(self) -> float:
    """Bytes that pass a chip's links: an all-reduce's go round twice."""
    twice = 2 if self.kind == 'all-reduce' else 1
    share = 1.0
    if self.kind != 'collective-permute':
      share = (self.group - 1) / self.group
    return twice * share * self.bytes


def begun_by(
  instruction: Instruction, computation: Computation, program: Program
) -> tuple[Collective | None, str | None]:
  """What an instruction does to collectives.

  Returns:
    (the collective that it begins or None, what ends it): 'itself' if it runs
    alone; 'done' if a `-done` of the result does; a chain's id if the fusion
    that ends that chain does.
  """
  opcode = instruction.opcode
  if _kind(instruction) in KINDS:
    made = _collective(_kind(instruction), instruction, computation)
    return made, 'done' if opcode.endswith('-start') else 'itself'
  if opcode == 'recv' and '_xla_megascale_transfer_type' in instruction.rest:
    return _between_slices(instruction), 'done'
  if opcode not in ('fusion', 'async-start'):
    return None, None
  for name in instruction.called:
    inner = program.computations[name]
    part = next((x for x in inner if _kind(x) in KINDS), None)
    if part is None:
      continue
    kind = _kind(part)
    if kind == 'all-reduce' and _is_scatter(inner, instruction):
      kind = 'reduce-scatter'
    made = _collective(kind, part, inner, instruction)
    if opcode == 'async-start':
      return made, 'done'
    chain = part.attribute(r'chain_id="(\d+)"')
    if chain is None:
      return made, 'itself'
    if _has_target(inner, 'AsyncCollectiveStart'):
      return made, chain
  return None, None


def _kind(instruction: Instruction) -> str:
  return instruction.opcode.removesuffix('-start')


def ends_chain(instruction: Instruction, program: Program) -> str | None:
  """The id of the chain of which a fusion is the last part, or None."""
  if instruction.opcode != 'fusion':
    return None
  for name in instruction.called:
    inner = program.computations[name]
    if _has_target(inner, 'AsyncCollectiveDone'):
      for part in inner:
        chain = part.attribute(r'chain_id="(\d+)"')
        if part.opcode in KINDS and chain:
          return chain
  return None


def _has_target(computation: Computation, target: str) -> bool:
  return any(
    part.opcode == 'custom-call' and f'"{target}"' in part.rest
    for part in computation
  )


def _is_scatter(inner: Computation, fusion: Instruction) -> bool:
  slices = any(part.opcode == 'dynamic-slice' for part in inner)
  return 'all-reduce-scatter' in inner.name or (
    slices and 'AllReduceScatter' in fusion.rest
  )


def _collective(kind, instruction, computation, fusion=None) -> Collective:
  operands = computation.operands(instruction)
  given = [shape for operand in operands for shape in operand.shapes]
  got = list(instruction.shapes)
  if kind in ('all-reduce', 'reduce-scatter', 'collective-permute'):
    arrays = given
  elif kind == 'all-gather' and instruction.opcode.endswith('-start'):
    # Its result holds the operands too.
    arrays = got[len(given) : 2 * len(given)]
  else:
    arrays = got
  groups = instruction.attribute(r'(?:replica_groups|source_target_pairs)=(.*)')
  spread = (fusion or instruction).attribute(r'colors:(\d+)')
  return Collective(
    kind=kind,
    bytes=sum(shape.bytes for shape in arrays),
    dtype=max(arrays, key=lambda shape: shape.bytes).dtype if arrays else '',
    group=_members(groups or ''),
    colors=int(spread) if spread else 0,
    where=instruction.op_name,
  )


def _between_slices(recv: Instruction) -> Collective:
  """What the runtime does over the data center network for the chips."""
  kind = recv.attribute(r'_xla_megascale_transfer_type="(\w+)"')
  slices = recv.attribute(r'_xla_megascale_target="\{([\d,]*)\}') or '0,1'
  return Collective(
    kind=kind.lower().replace('_', '-'),
    bytes=recv.shapes[0].bytes,
    dtype=recv.shapes[0].dtype,
    group=len(slices.split(',')),
    colors=0,
    where=recv.op_name,
    crosses_slices=True,
  )


def _members(groups: str) -> int:
  """Number of chips in a group, from any of the notations of XLA."""
  if match := re.match(r'mesh\[([^\]]*)\].*?\{([^}]*)\}', groups):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    names = re.findall(r"'(\w+)'", match[2])
    return math.prod(int(sizes[name]) for name in names)
  if match := re.match(r'\[(\d+(?:,\d+)*)\]<=', groups):
    return int(match[1].split(',')[-1])
  if match := re.match(r'\{\{([\d,]*)\}', groups):
    return len(match[1].split(','))
  return 1
