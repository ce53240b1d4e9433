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
    program: as compiled for the chip.
    chip: gives clock, peak and bandwidths.
    memory: whether copies that are begun ahead keep memory busy.
  """
  result = Estimate()
  _play(program, program.entry, 1, chip, result, memory)
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


class _Play:
  """One run through a computation: a clock, and links that are busy until.

  `memory` is None where nobody asks for it, else a `_Memory`.
  """

  def __init__(self, memory: bool):
    self.now = 0.0
    self.busy_until = 0.0
    self.under_way = {}
    self.memory = _Memory() if memory else None


def _play(program, name, times, chip, result, memory) -> float:
  """Adds a computation's costs to the result; returns the seconds of a run."""
  computation = program.computations[name]
  play = _Play(memory)
  for instruction in computation:
    opcode = instruction.opcode
    if opcode == 'while':
      trips = hlo.trips(program, instruction, computation)
      body = instruction.attribute(r'body=%?([\w.\-]+)')
      play.now += trips * _play(
        program, body, times * trips, chip, result, memory
      )
      continue
    if opcode in ('call', 'conditional'):
      for called in instruction.called:
        play.now += _play(program, called, times, chip, result, memory)
      continue
    _end(instruction, program, play, times, result)
    _compute(instruction, computation, play, times, chip, result)
    _begin(instruction, computation, program, play, times, chip, result)
  for key in list(play.under_way):
    _wait(key, play, times, result)
  return play.now


def _compute(instruction, computation, play, times, chip, result) -> None:
  cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
  seconds = int(cycles) / chip.clock if cycles else 0.0
  if instruction.opcode == 'custom-call' and not cycles:
    work = flops.kernel_call_flops(instruction, computation) or 0.0
    seconds = work / (KERNEL_EFFICIENCY * chip.peak_flops)
    if flops.is_decode_attention(instruction):
      read = flops.decode_attention_bytes(instruction, computation)
      reading = read / (MEMORY_EFFICIENCY * chip.hbm_bandwidth)
      seconds = max(seconds, reading)
    result.kernel_seconds += times * seconds
  else:
    result.compute_seconds += times * seconds
  if play.memory is not None:
    waited = play.memory.wait(instruction, computation, play.now, seconds, chip)
    play.now += waited
    result.memory_seconds += times * waited
  if seconds:
    play.now += seconds
    result.by_operation[instruction.op_name or instruction.name] += (
      times * seconds
    )


class _Memory:
  """Who uses memory, one after the other."""

  _COPIES = ('copy', 'slice', 'dynamic-slice')

  def __init__(self):
    self._busy_until = 0.0
    self._copies = {}

  def wait(self, instruction, computation, now, seconds, chip) -> float:
    """Seconds that an instruction waits for memory.

    Args:
      instruction: may begin a copy, wait for one, or use memory itself.
      computation: that it stands in.
      now: when it begins.
      seconds: that it takes alone.
      chip: gives the bandwidth.
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


def _begin(instruction, computation, program, play, times, chip, result):
  collective, end = begun_by(instruction, computation, program)
  if collective is None:
    return
  kind = collective.kind
  if collective.crosses_slices:
    kind = f'{kind} between slices'
  traffic = result.traffic[kind]
  traffic.count += times
  traffic.bytes += times * collective.bytes
  beside = end != 'itself'
  if beside:
    traffic.overlapped += times * collective.bytes
  result.collectives.append((collective, times, beside))
  play.busy_until = max(play.busy_until, play.now) + seconds_on_links(
    collective, chip
  )
  key = instruction.name if end == 'done' else end
  play.under_way[key] = kind, play.busy_until
  if not beside:
    _wait(key, play, times, result)


def _end(instruction, program, play, times, result) -> None:
  """Waits for what ends here."""
  keys = [ends_chain(instruction, program)]
  if instruction.opcode.endswith('-done'):
    keys += instruction.operands
  for key in keys:
    if key in play.under_way:
      _wait(key, play, times, result)


def _wait(key, play, times, result) -> None:
  kind, ready = play.under_way.pop(key)
  exposed = max(0.0, ready - play.now)
  play.now += exposed
  result.traffic[kind].exposed_seconds += times * exposed
