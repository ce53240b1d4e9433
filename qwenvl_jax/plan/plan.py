"""The plan of a job: compiled, read, and put into figures per chip and step."""

import dataclasses
import math
import time
from typing import Any

from qwenvl_jax.model.int4 import PER_WORD
from qwenvl_jax.plan import compiling, estimate, flops, hlo
from qwenvl_jax.plan.jobs import Job
from qwenvl_jax.plan.model_flops import model_flops
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.sharding import data_shards
from qwenvl_jax.train.optimizer import flatten

# Bytes. Norms, biases and position tables are smaller, matrices larger.
_LARGE = 2**23
_COSTLIEST = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Figures are per chip and step unless their names say otherwise.

  All seconds, and what follows from them, are estimates: nothing ran. They are
  None where the program does not fit or was compiled with little effort.

  Attributes:
    topology: as 'v5e:16x16'.
    what: 'train', 'eval', 'prefill' or 'decode'.
    chips: in all slices.
    mesh: sizes of its axes.
    rows: of the global batch.
    accumulation: microbatches a step.
    rows_per_chip: of a microbatch on each shard of the data.
    fits: whether the program can run.
    peak_hbm_bytes: memory at the fullest moment, or what it would need.
    hbm_limit_bytes: usable memory.
    hbm_bytes_per_second: bandwidth of memory.
    hbm_read_bytes: that a step of 'decode' has to read from memory: the
      parameters that it multiplies with, and a full cache.
    hbm_share: of the estimated step, what reading takes at full bandwidth.
    argument_bytes: state and batch; the ideal where it does not fit.
    ideal_argument_bytes: of them if nothing were padded or kept whole.
    kept_bytes: by kind, of what a training step keeps from one to the next;
      the rest of the peak is activations, gradients and the batch.
    parameters: of the model.
    trained_parameters: of those.
    parameters_per_chip: that a chip keeps.
    program_flops: of the program, attention kernels included.
    kernel_flops: of those, attention kernels.
    model_flops: what the model needs, see `model_flops`.
    flops_ratio: program_flops over model_flops.
    estimated_step_seconds: the sum of the four that follow.
    estimated_compute_seconds: operations, by the compiler's own estimates.
    estimated_kernel_seconds: attention kernels.
    estimated_memory_seconds: of 'decode', waiting for memory while it serves
      copies of parameters that were begun ahead.
    estimated_exposed_seconds: waiting for collectives.
    estimated_mfu: model FLOPs over time and peak.
    collective_bytes: of all collectives.
    overlapped_share: of those bytes, sent beside computation.
    collectives: by kind: count, bytes, overlapped_bytes, exposed_seconds.
    float32_gather_bytes: of all-gathers in float32 of more than a few MB.
    gather_ratio: bytes of all-gathers, in units of all parameters in bfloat16,
      a microbatch.
    full_gradient_all_reduces: large all-reduces of the backward pass, where a
      reduce-scatter would do with half.
    gather_overlapped_share: of the all-gathers' bytes.
    estimated_tokens_per_second: of all chips.
    estimated_images_per_second: of all chips.
    steps: of the stage.
    estimated_days: the stage takes.
    estimated_chip_hours: the stage costs.
    costliest: the operations that take longest, by their place in the source,
      with their estimated seconds.
    compile_seconds: that planning took.
    unknown_kernels: custom kernels that are not in the figures.
    advice: what to change where it does not fit.
  """

  topology: str
  what: str
  chips: int
  mesh: dict[str, int]
  rows: int
  accumulation: int
  rows_per_chip: float
  fits: bool
  peak_hbm_bytes: int
  hbm_limit_bytes: int
  hbm_bytes_per_second: float
  hbm_read_bytes: float | None = None
  hbm_share: float | None = None
  argument_bytes: int
  ideal_argument_bytes: float
  kept_bytes: dict[str, int]
  parameters: int
  trained_parameters: int
  parameters_per_chip: float
  program_flops: float | None = None
  kernel_flops: float | None = None
  model_flops: float
  flops_ratio: float | None = None
  estimated_step_seconds: float | None = None
  estimated_compute_seconds: float | None = None
  estimated_kernel_seconds: float | None = None
  estimated_memory_seconds: float | None = None
  estimated_exposed_seconds: float | None = None
  estimated_mfu: float | None = None
  collective_bytes: float | None = None
  overlapped_share: float | None = None
  collectives: dict[str, dict[str, float]] = dataclasses.field(
    default_factory=dict
  )
  float32_gather_bytes: float | None = None
  gather_ratio: float | None = None
  full_gradient_all_reduces: int | None = None
  gather_overlapped_share: float | None = None
  estimated_tokens_per_second: float | None = None
  estimated_images_per_second: float | None = None
  steps: int | None = None
  estimated_days: float | None = None
  estimated_chip_hours: float | None = None
  costliest: dict[str, float] = dataclasses.field(default_factory=dict)
  compile_seconds: float
  unknown_kernels: list[str] = dataclasses.field(default_factory=list)
  advice: list[str]


def make_plan(job: Job, topology: Topology, quick: bool = False) -> Plan:
  """Compiles a job and reads what it will cost.

  `quick` is that of `compiling.compile_program`; times are left out.
  """
  began = time.perf_counter()
  compiled = compiling.compile_program(job.lower(), quick)
  seconds = time.perf_counter() - began
  figures = _setting(job, topology) | {
    'fits': compiled.fits,
    'peak_hbm_bytes': compiled.peak_bytes,
    'hbm_limit_bytes': topology.chip.hbm_bytes,
    'hbm_bytes_per_second': topology.chip.hbm_bandwidth,
    'hbm_read_bytes': job.hbm_read_bytes,
    'argument_bytes': compiled.argument_bytes
    or round(job.ideal_argument_bytes),
    'compile_seconds': seconds,
    'advice': [] if compiled.fits else advice(job, topology),
  }
  if compiled.fits:
    figures |= _reading(compiled.text, job, topology, figures, not quick)
  return Plan(**figures)


def needed_flops(job: Job) -> float:
  """FLOPs of a step by the model's own arithmetic, all chips together."""
  shapes = {
    path.removesuffix('/words'): (*leaf.shape, count)
    for path, (leaf, count) in _held(job).items()
  }
  return model_flops(job.config, shapes, job.trained, job.work)


def _held(job: Job) -> dict[str, tuple[Any, int]]:
  """By path, an array of parameters, and how many each of its numbers holds.

  Of packed kernels, the words hold the parameters.
  """
  return {
    path: (leaf, PER_WORD if path.endswith('/words') else 1)
    for path, leaf in flatten(job.params).items()
    if not path.endswith(('/zeros', '/scales'))
  }


def _setting(job: Job, topology: Topology) -> dict[str, Any]:
  held = _held(job)
  shards = data_shards(job.mesh)
  return {
    'topology': topology.name,
    'what': job.what,
    'chips': topology.chips,
    'mesh': dict(job.mesh.shape),
    'rows': job.work.rows,
    'accumulation': job.accumulation,
    'rows_per_chip': job.work.rows / job.accumulation / shards,
    'ideal_argument_bytes': job.ideal_argument_bytes,
    'kept_bytes': dict(job.kept_bytes),
    'parameters': sum(leaf.size * count for leaf, count in held.values()),
    'trained_parameters': sum(held[path][0].size for path in job.trained),
    'parameters_per_chip': sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * count
      for leaf, count in held.values()
    ),
    'model_flops': needed_flops(job) / topology.chips,
    'steps': job.steps,
  }


def _reading(text, job, topology, setting, timed) -> dict[str, Any]:
  program = hlo.parse(text)
  waits_for_memory = job.hbm_read_bytes is not None
  played = estimate.estimate(program, topology.chip, waits_for_memory)
  kernels, unknown = flops.kernel_flops(program)
  total = flops.product_flops(program) + kernels
  needed = setting['model_flops']
  gathers = played.traffic.get('all-gather', estimate.Traffic())
  figures = {
    'program_flops': total,
    'kernel_flops': kernels,
    'flops_ratio': total / needed,
    'collective_bytes': played.bytes,
    'collectives': {
      kind: {
        'count': traffic.count,
        'bytes': traffic.bytes,
        'overlapped_bytes': traffic.overlapped,
      }
      for kind, traffic in sorted(played.traffic.items())
    },
    'float32_gather_bytes': sum(
      times * one.bytes
      for one, times, _ in played.collectives
      if one.kind == 'all-gather' and one.dtype == 'f32' and one.bytes > _LARGE
    ),
    'gather_ratio': (
      gathers.bytes / (2 * setting['parameters'] * job.accumulation)
    ),
    'full_gradient_all_reduces': sum(
      times
      for one, times, _ in played.collectives
      if one.kind == 'all-reduce'
      and one.bytes > _LARGE
      and 'transpose' in one.where
    ),
    'unknown_kernels': unknown,
  }
  if not timed:
    return figures
  seconds = played.seconds
  work = job.work
  for kind, traffic in played.traffic.items():
    figures['collectives'][kind]['exposed_seconds'] = traffic.exposed_seconds
  figures |= {
    'costliest': dict(played.by_operation.most_common(_COSTLIEST)),
    'overlapped_share': played.overlapped_share,
    'gather_overlapped_share': (
      gathers.overlapped / gathers.bytes if gathers.bytes else 1.0
    ),
    'estimated_step_seconds': seconds,
    'estimated_compute_seconds': played.compute_seconds,
    'estimated_kernel_seconds': played.kernel_seconds,
    'estimated_memory_seconds': played.memory_seconds,
    'estimated_exposed_seconds': played.exposed_seconds,
    'estimated_mfu': needed / seconds / topology.chip.peak_flops,
    'estimated_tokens_per_second': work.rows * work.length / seconds,
    'estimated_images_per_second': work.rows * work.images / seconds,
  }
  if waits_for_memory:
    reading = job.hbm_read_bytes / topology.chip.hbm_bandwidth
    figures['hbm_share'] = reading / seconds
  if job.steps is not None:
    hours = job.steps * seconds / 3600
    figures['estimated_days'] = hours / 24
    figures['estimated_chip_hours'] = hours * topology.chips
  return figures


def advice(job: Job, topology: Topology) -> list[str]:
  """What to change about a program that does not fit, cheapest first."""
  found = []
  shards = data_shards(job.mesh)
  rows = job.work.rows // job.accumulation // shards
  if job.what == 'train' and rows > 1:
    smaller = next(n for n in range(2, rows + 1) if rows % n == 0)
    found.append(
      f'smaller microbatches: TrainConfig.accumulation='
      f'{job.accumulation * smaller} leaves {rows // smaller} of {rows} rows '
      'a shard'
    )
  if job.what == 'train' and job.config.remat != 'full':
    found.append(
      "recompute more: QwenVLConfig.remat='full' instead of "
      f'{job.config.remat!r}'
    )
  copies, tensor = job.mesh.shape['data'], job.mesh.shape['tensor']
  if copies > topology.slices:
    ways = job.mesh.size // tensor // topology.slices
    found.append(
      f'split the parameters further: MeshConfig.data={topology.slices} and '
      f'fsdp={ways} instead of data={copies}'
    )
  share = job.ideal_argument_bytes / topology.chip.hbm_bytes
  if share > 0.5:
    found.append(f'more chips: the arguments alone fill {share:.0%} of each')
  if job.what in ('prefill', 'decode'):
    found.append('fewer rows at a time: --rows, or a shorter --length')
  if job.mesh.size >= 2 * tensor:
    found.append(f'split every layer: MeshConfig.tensor={2 * tensor}')
  return found
