"""Estimated time of a compiled program: a schedule, played through.

The compiler writes beside most operations how many cycles it expects them to
take. Collectives carry no estimate: they take their bytes over the bandwidth of
the links, which serve one after the other. Attention kernels carry none either:
they take their FLOPs at half of the chip's peak, or what they read from memory
at `MEMORY_EFFICIENCY` of its bandwidth, if that is more. Nothing of this was
measured on a chip; it is an estimate and named so.

A step that waits for memory needs one thing more. The compiler copies
parameters ahead, into vector memory, and counts no time for that, though memory
serves only one at a time. Where it is asked for, whoever uses memory waits for
the copies that were begun before.
"""

import collections
import dataclasses

from qwenvl_jax.plan import flops, hlo
from qwenvl_jax.plan.collectives import Collective, begun_by, ends_chain
from qwenvl_jax.plan.topology import Chip

# What an attention kernel reaches of the peak.
KERNEL_EFFICIENCY = 0.5
# What a decode kernel reaches of the bandwidth of memory; docs/serving.md says
# why.
MEMORY_EFFICIENCY = 0.86


@dataclasses.dataclass
class Traffic:
  """Of one kind of collective, per chip and step.

  Attributes:
    count: how many run.
    bytes: see `Collective.bytes`.
    overlapped: bytes of those that run beside computation.
    exposed_seconds: in which the chip waits for them.
  """

  count: int = 0
  bytes: float = 0.0
  overlapped: float = 0.0
  exposed_seconds: float = 0.0


@dataclasses.dataclass
class Estimate:
  """Where the time goes, per chip and step.

  Attributes:
    compute_seconds: operations with the compiler's estimate.
    kernel_seconds: attention kernels.
    memory_seconds: waiting for memory, beside what the two above contain.
    traffic: by kind of collective.
    collectives: all of them, with how often each runs and whether beside
      computation.
    by_operation: seconds by `op_name`.
  """

  compute_seconds: float = 0.0
  kernel_seconds: float = 0.0
  memory_seconds: float = 0.0
  traffic: dict[str, Traffic] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(Traffic)
  )
  collectives: list[tuple[Collective, int, bool]] = dataclasses.field(
    default_factory=list
  )
  by_operation: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  @property
  def exposed_seconds(self) -> float:
    return sum(t.exposed_seconds for t in self.traffic.values())

  @property
  def seconds(self) -> float:
    return (
      self.compute_seconds
      + self.kernel_seconds
      + self.memory_seconds
      + self.exposed_seconds
    )

  @property
  def bytes(self) -> float:
    return sum(t.bytes for t in self.traffic.values())

  @property
  def overlapped_share(self) -> float:
    """Of the bytes; 1 where nothing is sent."""
    if not self.bytes:
      return 1.0
    return sum(t.overlapped for t in self.traffic.values()) / self.bytes


def estimate(
  program: hlo.Program, chip: Chip, memory: bool = False
) -> Estimate:
  """Plays a program through.

  Args:
    memory: whether copies that are begun ahead keep memory busy.
  """
  result = Estimate()
  _Run(program, chip, result, memory, program.entry).play()
  return result


def seconds_on_links(collective: Collective, chip: Chip) -> float:
  """How long a collective keeps the links busy.

  One that goes round a ring of one colour has the links of one axis of a plane
  only; a permute has one link in one direction.
  """
  if collective.crosses_slices:
    return collective.wire_bytes / chip.dcn_bandwidth
  bandwidth = chip.collective_bandwidth
  if collective.kind == 'collective-permute':
    bandwidth /= 2 * chip.axes
  elif collective.colors == 1 and chip.axes == 2:
    bandwidth /= 2
  return collective.wire_bytes / bandwidth


class _Memory:
  """Who uses memory, one after the other."""

  _COPIES = ('copy', 'slice', 'dynamic-slice')

  def __init__(self):
    self._busy_until = 0.0
    self._copies = {}

  def wait(self, instruction, computation, now, seconds, chip) -> float:
    """Seconds that an instruction waits for memory.

    It may begin a copy, wait for one, or use memory itself. It begins `now`,
    and takes `seconds` alone.
    """
    base, _, end = instruction.opcode.rpartition('-')
    if base in self._COPIES and end == 'start':
      moved = max(
        (shape.bytes for shape in instruction.shapes if shape.on_chip),
        default=2 * instruction.shapes[0].bytes,
      )
      self._copies[instruction.name] = self._use(
        now, moved / chip.hbm_bandwidth
      )
      return 0.0
    if base in self._COPIES and end == 'done':
      (begun,) = instruction.operands
      return max(0.0, self._copies.pop(begun, now) - now)
    if not seconds:
      return 0.0
    operands = computation.operands(instruction)
    used = sum(
      shape.bytes
      for one in (instruction, *operands)
      for shape in one.shapes
      if not shape.on_chip
    )
    if not used:
      return 0.0
    # Of a table that rows are taken from, not all is read. What a kernel does
    # not reach of the bandwidth is there for nobody.
    using = min(used / chip.hbm_bandwidth, seconds)
    if flops.is_decode_attention(instruction):
      using = seconds
    done = self._use(now, using)
    return max(0.0, done - now - seconds)

  def _use(self, now: float, seconds: float) -> float:
    """When memory has served someone who asks for so many seconds of it."""
    self._busy_until = max(self._busy_until, now) + seconds
    return self._busy_until


@dataclasses.dataclass
class _Run:
  """A run through a computation: a clock, and links that are busy until.

  Attributes:
    result: receives the costs, times how often the computation runs.
    counts_memory: see `estimate`.
    name: of the computation.
    times: how often it runs.
  """

  program: hlo.Program
  chip: Chip
  result: Estimate
  counts_memory: bool
  name: str
  times: int = 1

  def __post_init__(self):
    self.computation = self.program.computations[self.name]
    self.now = 0.0
    self.busy_until = 0.0
    self.under_way = {}
    self.memory = _Memory() if self.counts_memory else None

  def play(self) -> float:
    """Adds the costs to the result; returns the seconds of a run."""
    for instruction in self.computation:
      if instruction.opcode == 'while':
        trips = hlo.trips(self.program, instruction, self.computation)
        body = instruction.attribute(r'body=%?([\w.\-]+)')
        self.now += trips * self._inner(body, trips)
      elif instruction.opcode in ('call', 'conditional'):
        self.now += sum(map(self._inner, instruction.called))
      else:
        self._end(instruction)
        self._compute(instruction)
        self._begin(instruction)
    for key in list(self.under_way):
      self._wait(key)
    return self.now

  def _inner(self, name: str, trips: int = 1) -> float:
    return dataclasses.replace(self, name=name, times=self.times * trips).play()

  def _compute(self, instruction: hlo.Instruction) -> None:
    cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
    seconds = int(cycles) / self.chip.clock if cycles else 0.0
    if instruction.opcode == 'custom-call' and not cycles:
      seconds = self._kernel_seconds(instruction)
      self.result.kernel_seconds += self.times * seconds
    else:
      self.result.compute_seconds += self.times * seconds
    if self.memory is not None:
      waited = self.memory.wait(
        instruction, self.computation, self.now, seconds, self.chip
      )
      self.now += waited
      self.result.memory_seconds += self.times * waited
    if seconds:
      self.now += seconds
      where = instruction.op_name or instruction.name
      self.result.by_operation[where] += self.times * seconds

  def _kernel_seconds(self, call: hlo.Instruction) -> float:
    work = flops.kernel_call_flops(call, self.computation) or 0.0
    seconds = work / (KERNEL_EFFICIENCY * self.chip.peak_flops)
    if flops.is_decode_attention(call):
      read = flops.decode_attention_bytes(call, self.computation)
      bandwidth = MEMORY_EFFICIENCY * self.chip.hbm_bandwidth
      seconds = max(seconds, read / bandwidth)
    return seconds

  def _begin(self, instruction: hlo.Instruction) -> None:
    collective, end = begun_by(instruction, self.computation, self.program)
    if collective is None:
      return
    kind = collective.kind
    if collective.crosses_slices:
      kind = f'{kind} between slices'
    traffic = self.result.traffic[kind]
    traffic.count += self.times
    traffic.bytes += self.times * collective.bytes
    beside = end != 'itself'
    if beside:
      traffic.overlapped += self.times * collective.bytes
    self.result.collectives.append((collective, self.times, beside))
    self.busy_until = max(self.busy_until, self.now)
    self.busy_until += seconds_on_links(collective, self.chip)
    key = instruction.name if end == 'done' else end
    self.under_way[key] = kind, self.busy_until
    if not beside:
      self._wait(key)

  def _end(self, instruction: hlo.Instruction) -> None:
    """Waits for what ends here."""
    keys = [ends_chain(instruction, self.program)]
    if instruction.opcode.endswith('-done'):
      keys += instruction.operands
    for key in keys:
      if key in self.under_way:
        self._wait(key)

  def _wait(self, key: str) -> None:
    kind, ready = self.under_way.pop(key)
    exposed = max(0.0, ready - self.now)
    self.now += exposed
    self.result.traffic[kind].exposed_seconds += self.times * exposed
