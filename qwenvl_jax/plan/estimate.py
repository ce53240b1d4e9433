"""Estimated time of a compiled program: a schedule, played through.

The compiler writes beside most operations how many cycles it expects them to
take. Collectives carry no estimate: they take their bytes over the bandwidth of
the links, which serve one after the other. Attention kernels carry none either:
they take their FLOPs at half of the chip's peak. Nothing of this was measured
on a chip; it is an estimate and named so.
"""

import collections
import dataclasses

from qwenvl_jax.plan import flops, hlo
from qwenvl_jax.plan.collectives import Collective, begun_by, ends_chain
from qwenvl_jax.plan.topology import Chip

# What an attention kernel reaches of the peak.
KERNEL_EFFICIENCY = 0.5


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
    traffic: by kind of collective.
    collectives: all of them, with how often each runs and whether beside
      computation.
    by_operation: seconds by `op_name`.
  """

  compute_seconds: float = 0.0
  kernel_seconds: float = 0.0
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
    return self.compute_seconds + self.kernel_seconds + self.exposed_seconds

  @property
  def bytes(self) -> float:
    return sum(t.bytes for t in self.traffic.values())

  @property
  def overlapped_share(self) -> float:
    """Of the bytes; 1 where nothing is sent."""
    if not self.bytes:
      return 1.0
    return sum(t.overlapped for t in self.traffic.values()) / self.bytes


def estimate(program: hlo.Program, chip: Chip) -> Estimate:
  """Plays a program through.

  Args:
    program: as compiled for the chip.
    chip: gives clock, peak and bandwidths.
  """
  result = Estimate()
  _play(program, program.entry, 1, chip, result)
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
  """One run through a computation: a clock, and links that are busy until."""

  def __init__(self):
    self.now = 0.0
    self.busy_until = 0.0
    self.under_way = {}


def _play(program, name, times, chip, result) -> float:
  """Adds a computation's costs to the result; returns the seconds of a run."""
  computation = program.computations[name]
  play = _Play()
  for instruction in computation:
    opcode = instruction.opcode
    if opcode == 'while':
      trips = hlo.trips(program, instruction, computation)
      body = instruction.attribute(r'body=%?([\w.\-]+)')
      play.now += trips * _play(program, body, times * trips, chip, result)
      continue
    if opcode in ('call', 'conditional'):
      for called in instruction.called:
        play.now += _play(program, called, times, chip, result)
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
    result.kernel_seconds += times * seconds
  else:
    result.compute_seconds += times * seconds
  if seconds:
    play.now += seconds
    result.by_operation[instruction.op_name or instruction.name] += (
      times * seconds
    )


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
