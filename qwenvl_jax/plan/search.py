"""Tries meshes, microbatches and remat policies, and ranks what fits.

A compilation takes minutes, so that few of the candidates can be compiled:
those that cannot fit by a lower bound of their memory are left out, those that
promise most come first, and what does not fit rules out what needs more. Every
answer is kept in a file, so that an interrupted search goes on.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import jax

import qwenvl_jax
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.plan import jobs
from qwenvl_jax.plan.memory import Sizes, lower_bound, promise
from qwenvl_jax.plan.plan import Plan, make_plan
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.sharding import MeshConfig, make_mesh
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.state import abstract_params

# From the least to the most that a layer computes again.
POLICIES = ('none', 'dots', 'full')
# Splitting every layer's work pays on few neighbouring chips only.
_TENSOR = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What a search may change of a configuration."""

  data: int
  fsdp: int
  tensor: int
  accumulation: int
  remat: str

  @property
  def text(self) -> str:
    """In a line."""
    return (
      f'data {self.data}, fsdp {self.fsdp}, tensor {self.tensor}, '
      f'accumulation {self.accumulation}, remat {self.remat}'
    )

  @property
  def overrides(self) -> list[str]:
    """As arguments of a command."""
    return [
      f'--gin.MeshConfig.data={self.data}',
      f'--gin.MeshConfig.fsdp={self.fsdp}',
      f'--gin.MeshConfig.tensor={self.tensor}',
      f'--gin.TrainConfig.accumulation={self.accumulation}',
      f'--gin.QwenVLConfig.remat=\'"{self.remat}"\'',
    ]

  def apply(self, config: TrainConfig) -> TrainConfig:
    """The configuration with these values."""
    objective = dataclasses.replace(
      config.objective, config=config.objective.config.replace(remat=self.remat)
    )
    return dataclasses.replace(
      config,
      objective=objective,
      mesh=dataclasses.replace(
        config.mesh, data=self.data, fsdp=self.fsdp, tensor=self.tensor
      ),
      accumulation=self.accumulation,
    )

  def needs_more_than(self, other: 'Candidate') -> bool:
    """Whether it takes no less memory than another one on the same mesh."""
    mesh = self.data, self.fsdp, self.tensor
    return (
      mesh == (other.data, other.fsdp, other.tensor)
      and self.accumulation <= other.accumulation
      and POLICIES.index(self.remat) <= POLICIES.index(other.remat)
    )


def candidates(config: TrainConfig, topology: Topology) -> list[Candidate]:
  """All that divide.

  Args:
    config: gives the batch and the number of heads.
    topology: copies of the parameters reach over slices, nothing else does.
  """
  found = []
  heads = config.objective.config.decoder.heads
  rows = config.data.batch_size
  chips = topology.chips
  for tensor, data in itertools.product(_TENSOR, range(1, chips + 1)):
    if heads % tensor or data % topology.slices or chips % (data * tensor):
      continue
    fsdp = chips // data // tensor
    shards = data * fsdp
    for per_shard in range(1, rows // shards + 1):
      if rows % (shards * per_shard):
        continue
      found += [
        Candidate(data, fsdp, tensor, rows // shards // per_shard, remat)
        for remat in POLICIES
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
    config: of a training run.
    topology: of the devices.
    devices: from `topology.devices`.
    folder: where answers are kept, made if absent.
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
    changed = candidate.apply(config)
    needed = lower_bound(changed, sizes, topology.chips)
    if needed <= topology.chip.hbm_bytes:
      seconds = promise(changed, sizes, topology)
      promising.append((seconds, len(promising), candidate))
  if not promising:
    raise ConfigError(
      f'no mesh and microbatch can hold the model on {topology.name}: the '
      'parameters with their optimizer state alone are too large, or the batch '
      f'of {config.data.batch_size} rows splits over no mesh; take more chips'
    )
  folder.mkdir(parents=True, exist_ok=True)
  total, tried, too_large = min(budget, len(promising)), 0, []
  for _, _, candidate in sorted(promising):
    if tried == budget:
      break
    if any(candidate.needs_more_than(other) for other in too_large):
      continue
    said(tried, total, candidate.text)
    answer = _answer(candidate.apply(config), topology, devices, folder)
    tried += 1
    if isinstance(answer, Plan) and not answer.fits:
      too_large.append(candidate)
    yield candidate, answer
  said(tried, tried, '')


def rank(found: Iterable[tuple[Candidate, Plan | str]]):
  """Those that fit, fastest first."""
  fitting = [
    (candidate, plan)
    for candidate, plan in found
    if isinstance(plan, Plan) and plan.fits
  ]
  return sorted(fitting, key=lambda pair: pair[1].estimated_step_seconds)


def _answer(config, topology, devices, folder: Path) -> Plan | str:
  """Compiles, unless the answer to the same question is in the folder."""
  question = repr(config), topology.name, _versions()
  name = hashlib.sha256(repr(question).encode()).hexdigest()[:24]
  path = folder / f'{name}.json'
  try:
    kept = json.loads(path.read_text())
    return Plan(**kept) if isinstance(kept, dict) else kept
  except FileNotFoundError:
    pass
  except (ValueError, TypeError):
    path.unlink()  # Cut short by an interruption.
  try:
    answer = make_plan(jobs.make('train', config, devices), topology)
    text = json.dumps(dataclasses.asdict(answer))
  except ConfigError as error:
    answer = str(error)
    text = json.dumps(answer)
  # A search traces many programs, none of them twice.
  jax.clear_caches()
  partial = path.with_suffix('.partial')
  partial.write_text(text)
  partial.replace(path)
  return answer


@functools.cache
def _versions() -> str:
  """Of all that decides what is compiled: our sources, jax, the compiler."""
  digest = hashlib.sha256()
  for path in sorted(Path(qwenvl_jax.__file__).parent.rglob('*.py')):
    digest.update(path.read_bytes())
  packages = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax')
  versions = [f'{name}={metadata.version(name)}' for name in packages]
  return ' '.join([digest.hexdigest(), *versions])
