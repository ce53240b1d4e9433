"""Tries meshes, microbatches and remat policies, and ranks what fits.

A compilation takes minutes, so that few of the candidates can be compiled:
those that cannot fit by a lower bound of their memory are left out, those that
promise most come first, and what does not fit rules out what needs more. Every
answer is kept in a file, so that an interrupted search goes on.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan.memory import (
  POLICIES,
  Sizes,
  heuristic_step_time,
  lower_bound,
)
from qwenvl_jax.plan.plan import Plan
from qwenvl_jax.plan.plan_cache import cached_plan
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.sharding import MeshConfig, make_mesh
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.state import abstract_params

# Splitting every layer's work pays on few neighbouring chips only.
_TENSOR = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What a search may change of a configuration.

  Attributes:
    rows: of a microbatch on each shard of the batch; follows from the others.
    inner: follows from the topology. Other fields are those of `MeshConfig`,
      `TrainConfig` and `QwenVLConfig`.
  """

  data: int
  fsdp: int
  tensor: int
  accumulation: int
  rows: int
  remat: str
  vision_remat: str | None = None
  inner: int = 1

  @property
  def text(self) -> str:
    """In a line."""
    vision = f', vision {self.vision_remat}' if self.vision_remat else ''
    return (
      f'data {self.data}, fsdp {self.fsdp}, tensor {self.tensor}, '
      f'accumulation {self.accumulation}, remat {self.remat}{vision}'
    )

  @property
  def overrides(self) -> list[str]:
    """As arguments of a command."""
    return [
      f'--gin.MeshConfig.data={self.data}',
      f'--gin.MeshConfig.fsdp={self.fsdp}',
      f'--gin.MeshConfig.tensor={self.tensor}',
      f'--gin.MeshConfig.inner={self.inner}',
      f'--gin.TrainConfig.accumulation={self.accumulation}',
      f'--gin.QwenVLConfig.remat={_shell(self.remat)}',
      f'--gin.QwenVLConfig.vision_remat={_shell(self.vision_remat)}',
    ]

  def apply(self, config: TrainConfig) -> TrainConfig:
    """The configuration with these values."""
    model = config.objective.config.replace(
      remat=self.remat, vision_remat=self.vision_remat
    )
    return dataclasses.replace(
      config,
      objective=dataclasses.replace(config.objective, config=model),
      mesh=MeshConfig(self.data, self.fsdp, self.tensor, self.inner),
      accumulation=self.accumulation,
    )

  def needs_more_than(self, other: 'Candidate') -> bool:
    """Whether it takes no less memory than another one."""
    kept = list(POLICIES).index
    return (
      self.tensor == other.tensor
      and self.fsdp <= other.fsdp
      and self.rows >= other.rows
      and kept(self.remat) <= kept(other.remat)
      and kept(self.vision_remat or self.remat)
      <= kept(other.vision_remat or other.remat)
    )


def candidates(config: TrainConfig, topology: Topology) -> list[Candidate]:
  """All that divide batch, heads and chips.

  Copies of the parameters reach over slices, nothing else does.
  """
  found = []
  heads = config.objective.config.decoder.heads
  rows = config.data.batch_size
  chips = topology.chips
  for tensor, data in itertools.product(_TENSOR, range(1, chips + 1)):
    if heads % tensor or data % topology.slices or chips % (data * tensor):
      continue
    fsdp = chips // data // tensor
    inner = _inner(topology, fsdp)
    shards = data * fsdp
    for per_shard in range(1, rows // shards + 1):
      if rows % (shards * per_shard):
        continue
      microbatches = rows // shards // per_shard
      found += [
        Candidate(
          data, fsdp, tensor, microbatches, per_shard, remat, vision, inner
        )
        for remat in POLICIES
        for vision in ((None,) if remat == 'full' else (None, 'full'))
      ]
  return found


def search(
  config: TrainConfig,
  topology: Topology,
  devices: Sequence,
  folder: Path,
  budget: int,
  said: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[tuple[Candidate, Plan | str]]:
  """Compiles the most promising candidates.

  Args:
    budget: most answers, whether compiled now or kept from before.
    said: told (candidates tried, of how many, what comes now).

  Yields:
    Each candidate with its plan, or with why it cannot be had.

  Raises:
    ConfigError: nothing divides or could fit.
  """
  first = make_mesh(MeshConfig(), devices[:1])
  sizes = Sizes.of(
    config, abstract_params(config.objective, config.optimizer, first)
  )
  promising = []
  for candidate in candidates(config, topology):
    if candidate.vision_remat and not sizes.trains_vision:
      continue  # Without a backward pass, nothing is kept.
    changed = candidate.apply(config)
    needed = lower_bound(changed, sizes, topology.chips)
    if needed <= topology.chip.hbm_bytes:
      seconds = heuristic_step_time(changed, sizes, topology)
      promising.append((seconds, len(promising), candidate, needed))
  if not promising:
    raise ConfigError(
      f'no mesh and microbatch can hold the model on {topology.name}: the '
      'parameters with their optimizer state alone are too large, or the batch '
      f'of {config.data.batch_size} rows splits over no mesh; take more chips'
    )
  queue = [(c, needed) for _, _, c, needed in sorted(promising)]
  total, tried, too_large = min(budget, len(queue)), 0, []
  # Per policy: the least that memory was above its lower bound so far.
  above = {}
  while tried < total:
    queue = [
      (candidate, needed)
      for candidate, needed in queue
      if needed * above.get(candidate.remat, 1.0) <= topology.chip.hbm_bytes
      and not any(candidate.needs_more_than(other) for other in too_large)
    ]
    if not queue:
      break
    candidate, needed = queue.pop(0)
    said(tried, total, candidate.text)
    try:
      plan = cached_plan(candidate.apply(config), topology, devices, folder)
    except ConfigError as error:
      # A mesh that the network does not allow: nothing was compiled.
      yield candidate, str(error)
      continue
    tried += 1
    ratio = plan.peak_hbm_bytes / needed
    above[candidate.remat] = min(ratio, above.get(candidate.remat, ratio))
    if not plan.fits:
      too_large.append(candidate)
    yield candidate, plan
  said(total, total, 'done')


def _inner(topology: Topology, fsdp: int) -> int:
  """A side of the torus, where `fsdp` reaches over more than that."""
  side = next((n for n in reversed(topology.shape) if n > 1), 1)
  return side if fsdp > side and fsdp % side == 0 else 1


def _shell(value: str | None) -> str:
  """A value of gin, quoted for the shell if it is a string."""
  return 'None' if value is None else f'\'"{value}"\''


def rank(found: Iterable[tuple[Candidate, Plan | str]]):
  """Those that fit, fastest first."""
  fitting = [
    (candidate, plan)
    for candidate, plan in found
    if isinstance(plan, Plan) and plan.fits
  ]
  return sorted(fitting, key=lambda pair: pair[1].estimated_step_seconds)
