"""Reads the text of a compiled program: computations, instructions, loops.

`compiled.as_text()` is XLA's scheduled program. Every loop's body stands there
once, so that whatever is counted has to be multiplied by the trips of the loops
around it; `walk` does that.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
  's32': 32, 'u32': 32, 's64': 64, 'u64': 64, 'bf16': 16, 'f16': 16,
  'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128,
}  # fmt: skip
_SHAPE = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?')
# In a layout: the memory beside a TPU's units, not the large one.
_ON_CHIP = 'S(1)'
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*->.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'([\w\-]+)\(')
_OPERAND = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|branch_computations|true_computation|'
  r'false_computation)=(\{[^}]*\}|%?[\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of one array.

  Attributes:
    dtype: as 'bf16'.
    dims: sizes of its axes.
    on_chip: whether it lies in the chip's vector memory, not in HBM.
  """

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool = dataclasses.field(default=False, compare=False)

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    """Without the padding of layouts; 0 for tokens and opaque values."""
    if self.dtype.startswith('f8'):
      return self.size
    return self.size * _BITS.get(self.dtype, 0) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the program.
    opcode: as 'fusion' or 'all-gather-start'.
    shapes: of the result; several for a tuple.
    operands: names of other instructions of the computation.
    arguments: the text between the parentheses.
    rest: the text after them: attributes.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  arguments: str
  rest: str

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations it calls; a loop's condition comes too."""
    return tuple(
      name
      for match in _CALLED.finditer(self.rest)
      for name in re.findall(r'[\w.\-]+', match[1])
    )

  def attribute(self, pattern: str) -> str | None:
    """The first group of a pattern in the attributes."""
    match = re.search(pattern, self.rest)
    return match[1] if match else None

  @property
  def bytes(self) -> float:
    """Of the result."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def op_name(self) -> str:
    """Where in the traced functions it comes from."""
    return self.attribute(r'op_name="([^"]*)"') or ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run; `root` gives the result."""

  name: str
  instructions: dict[str, Instruction]
  root: Instruction

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """Those that are in this computation (all, in a whole program)."""
    found = (self.instructions.get(name) for name in instruction.operands)
    return [operand for operand in found if operand is not None]


@dataclasses.dataclass(frozen=True)
class Program:
  """All computations, by name; `entry` is the name of the first to run."""

  computations: dict[str, Computation]
  entry: str


@dataclasses.dataclass(frozen=True)
class Visit:
  """An instruction where it is run.

  Attributes:
    times: how often it runs.
    fused: whether it is part of a fusion or an asynchronous operation.
  """

  instruction: Instruction
  computation: Computation
  times: int
  fused: bool


def parse(text: str) -> Program:
  """Reads a program from the text of `compiled.as_text()`.

  Raises:
    ValueError: this is not a program.
  """
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines():
    if name is None:
      match = _HEADER.match(line)
      if match:
        name, lines = match[2], []
        entry = name if match[1] else entry
    elif line == '}' or line.startswith('}, '):  # Of a core of another kind.
      computations[name] = _computation(name, lines)
      name = None
    elif _INSTRUCTION.match(line):
      lines.append(line)
    elif lines:
      # A kernel's metadata goes over several lines.
      lines[-1] += line
  if entry is None:
    raise ValueError('no ENTRY computation in the text')
  return Program(computations, entry)


def _computation(name: str, lines: list[str]) -> Computation:
  found = [_instruction(line) for line in lines]
  roots = [i for i, line in zip(found, lines) if _INSTRUCTION.match(line)[1]]
  return Computation(name, {i.name: i for i in found}, roots[0])


def _instruction(line: str) -> Instruction:
  match = _INSTRUCTION.match(line)
  name, text = match[2], line[match.end() :]
  end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
  shapes = tuple(
    Shape(
      dtype, tuple(int(n) for n in dims.split(',') if n), _ON_CHIP in layout
    )
    for dtype, dims, layout in _SHAPE.findall(text[:end])
  )
  opcode = _OPCODE.search(text, end)
  close = _closing(text, opcode.end() - 1)
  arguments = text[opcode.end() : close]
  operands = tuple(_OPERAND.findall(arguments))
  return Instruction(
    name, opcode[1], shapes, operands, arguments, text[close + 1 :]
  )


_BRACKETS = re.compile(r'[()]')


def _closing(text: str, opening: int) -> int:
  """Index of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in _BRACKETS.finditer(text, opening):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  raise ValueError(f'unbalanced parentheses: {text[:200]}')


def trips(program: Program, loop: Instruction, around: Computation) -> int:
  """How often a loop's body runs.

  XLA notes it beside the loop, or it follows from the counter: where it starts,
  what the body adds to it and what the condition compares it with. A loop whose
  length depends on values, as that of a decoder that may stop early, counts
  once.
  """
  known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
  if known:
    return int(known)
  condition, body = (
    program.computations[loop.attribute(rf'{name}=%?([\w.\-]+)')]
    for name in ('condition', 'body')
  )
  compare = condition.root
  if compare.opcode != 'compare' or 'direction=LT' not in compare.rest:
    return 1
  counter, limit = condition.operands(compare)
  limit, index = _constant(limit, condition), counter.attribute(r'index=(\d+)')
  if limit is None or index is None:
    return 1
  start = _element(loop.operands[0], int(index), around)
  after = body.instructions[body.root.operands[int(index)]]
  steps = [_constant(operand, body) for operand in body.operands(after)]
  step = next((n for n in steps if n), 1) if after.opcode == 'add' else 1
  return max(0, -(-(limit - (start or 0)) // step))


def _element(name: str, index: int, computation: Computation) -> int | None:
  """A number that stands at a place of a tuple, if it is constant."""
  made = computation.instructions[name]
  if made.opcode != 'tuple':
    return None
  return _constant(computation.instructions[made.operands[index]], computation)


def _constant(instruction: Instruction, computation: Computation) -> int | None:
  while instruction.opcode in ('copy', 'bitcast'):
    found = computation.operands(instruction)
    if not found:
      return None
    instruction = found[0]
  number = re.fullmatch(r'-?\d+', instruction.arguments)
  if instruction.opcode != 'constant' or not number:
    return None
  return int(number[0])


def walk(program: Program) -> Iterator[Visit]:
  """Every instruction that runs, with how often; callers before called.

  Of a conditional, all branches count as taken: an upper bound.
  """
  yield from _visit(program, program.entry, 1, False)


def _visit(program, name, times, fused) -> Iterator[Visit]:
  computation = program.computations[name]
  for instruction in computation:
    yield Visit(instruction, computation, times, fused)
    inner, opcode = times, instruction.opcode
    if opcode == 'while':
      inner *= trips(program, instruction, computation)
    # Not what reductions and collectives apply to their elements.
    elif opcode not in ('call', 'conditional', 'fusion', 'async-start'):
      continue
    around = fused or opcode in ('fusion', 'async-start')
    for called in instruction.called:
      yield from _visit(program, called, inner, around)
