"""Plans of training steps, kept in a folder: compiling takes minutes."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.plan import jobs
from qwenvl_jax.plan.plan import Plan, make_plan
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.train.loop import TrainConfig


def cached_plan(
  config: TrainConfig, topology: Topology, devices: Sequence, folder: Path
) -> Plan:
  """The plan of a training step, compiled unless the folder has it.

  A plan is found again for the same configuration and topology as long as
  neither this package nor the compiler changes.

  Raises:
    ConfigError: a mesh or a batch that the devices do not allow.
  """
  question = repr(config), topology.name, _versions()
  name = hashlib.sha256(repr(question).encode()).hexdigest()[:24]
  path = folder / f'{name}.json'
  if path.exists():
    return Plan(**json.loads(path.read_text()))
  plan = make_plan(jobs.make('train', config, devices), topology)
  folder.mkdir(parents=True, exist_ok=True)
  buckets.write(path, json.dumps(dataclasses.asdict(plan)))
  return plan


@functools.cache
def _versions() -> str:
  """Of all that decides what is compiled: our sources, jax, the compiler."""
  digest = hashlib.sha256()
  for path in sorted(Path(__file__).parents[1].rglob('*.py')):
    digest.update(path.read_bytes())
  packages = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax')
  versions = [f'{name}={metadata.version(name)}' for name in packages]
  return ' '.join([digest.hexdigest(), *versions])
