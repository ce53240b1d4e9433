"""Low-rank adapters in memory, and the folders of ours that hold them.

An adapter of ours is what a run trained and nothing else:

  lora.json                     settings, and what it was trained on
  trained/                      Orbax arrays: factors, and what is trained whole

A training run with low-rank factors has `lora.json` at its root, and in
`checkpoints/STEP/trained/` the arrays. Their paths are those of the stacked
tree of parameters.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from qwenvl_jax import buckets
from qwenvl_jax.conversion import checkpoint_io, layout, orbax_store
from qwenvl_jax.conversion.families.qwen_vl.lora_table import lora_rules
from qwenvl_jax.conversion.json_schema import (
  FLAG,
  TEXT,
  TEXTS,
  Field,
  Schema,
  an_object,
  check,
  read_json,
  real,
  whole,
)
from qwenvl_jax.conversion.rules import Rule
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.lora import LoraConfig, is_factor

FILE = 'lora.json'
TRAINED = 'trained'

_SETTINGS: Schema = {
  'rank': Field(whole(1, 2**16)),
  'alpha': Field(real(1e-6, 1e6)),
  'dropout': Field(real(0, 1)),
  'targets': Field(TEXTS),
  'rslora': Field(FLAG, False),
}
_BASE: Schema = {
  'folder': Field(TEXT),
  'digest': Field(TEXT, None),
}
_SCHEMA: Schema = {
  'lora': Field(an_object(_SETTINGS)),
  'base': Field(an_object(_BASE)),
}


@dataclasses.dataclass(frozen=True)
class Base:
  """The model that an adapter was trained on.

  Attributes:
    folder: where it was.
    digest: of its values, see `base_digest.digest`; None if it is not known, as
      of PEFT's adapters.
  """

  folder: str
  digest: str | None = None


@dataclasses.dataclass(frozen=True)
class LowRank:
  """An adapter.

  Attributes:
    lora: its settings.
    base: what it was trained on.
    values: path to array, of the stacked tree; factors and what was trained
      whole.
    where: its folder, for messages.
  """

  lora: LoraConfig
  base: Base
  values: Mapping[str, np.ndarray]
  where: str

  @property
  def whole(self) -> list[str]:
    """The paths of what was trained whole."""
    return [path for path in self.values if not is_factor(path)]

  def check_fits(self, config: QwenVLConfig, base: str) -> None:
    """Compares with a model.

    Args:
      config: of the model.
      base: its folder, for messages.

    Raises:
      CheckpointError: the adapter is of a model of other sizes, lacks factors,
        or has some of another rank than its settings say.
    """
    config = config.replace(lora=self.lora, scan_layers=True)
    shapes = layout.parameter_shapes(config)
    wanted = factor_shapes(config)
    wanted |= {path: shapes[path] for path in self.whole if path in shapes}
    found = {path: x.shape for path, x in self.values.items()}
    try:
      layout.check_shapes(wanted, found, f'{self.where} on {base}')
    except CheckpointError as error:
      reason = str(error).split('config.json. ')[-1]
      raise CheckpointError(
        f'{self.where} does not fit {base} (rank {self.lora.rank}, '
        f'{", ".join(self.lora.names)}): {reason}. It was trained on '
        f'{self.base.folder or "another model"}'
      ) from error


def factor_shapes(config: QwenVLConfig) -> dict[str, tuple[int, ...]]:
  """Path to shape of every low-rank factor of a model, layers stacked."""
  return layout.shapes_of(lora_rules(config))


def released(adapter: LowRank, table: Iterable[Rule]) -> dict[str, np.ndarray]:
  """Gives what was trained as float32 tensors by their released names.

  Args:
    adapter: of a model.
    table: of the factors, or of what was trained whole.
  """
  found = {}
  for name, rule, layer in layout.entries(table):
    arrays = [np.float32(adapter.values[path]) for path in rule.paths]
    parts = arrays if layer is None else [x[layer] for x in arrays]
    found[name] = np.ascontiguousarray(rule.to_released(*parts))
  return found


def is_ours(folder: Path) -> bool:
  """Whether a folder is an adapter of ours, or a run that trained one."""
  return checkpoint_io.find_asset(folder, FILE).exists()


def read_settings(folder: Path) -> tuple[LoraConfig, Base]:
  """Reads `lora.json`.

  Raises:
    CheckpointError: it is damaged.
  """
  path = checkpoint_io.find_asset(folder, FILE)
  found = check(read_json(path), _SCHEMA, str(path))
  try:
    settings = found['lora'] | {'targets': tuple(found['lora']['targets'])}
    return LoraConfig(**settings), Base(**found['base'])
  except ConfigError as error:
    raise CheckpointError(f'{path}: {error}') from error


def write_settings(folder: Path, lora: LoraConfig, base: Base) -> None:
  """Writes `lora.json`."""
  settings = dataclasses.asdict(lora) | {'targets': list(lora.names)}
  content = {'lora': settings, 'base': dataclasses.asdict(base)}
  buckets.write(folder / FILE, json.dumps(content, indent=2) + '\n')


def write_ours(folder: Path, adapter: LowRank) -> None:
  """Writes an adapter to a folder that is there."""
  tree = layout.unflatten(dict(adapter.values))
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(buckets.absolute(folder) / TRAINED, tree)
  write_settings(folder, adapter.lora, adapter.base)


def read_ours(folder: Path) -> LowRank:
  """Reads an adapter of ours, of a run the newest complete step.

  Raises:
    CheckpointError: it is damaged, or no step is complete yet.
  """
  lora, base = read_settings(folder)
  stored = checkpoint_io.params_folder(folder, TRAINED)
  if stored is None:
    raise CheckpointError(f'{folder} holds no {TRAINED}/ beside {FILE}')
  values = orbax_store.read_arrays(stored)
  return LowRank(lora, base, values, str(folder))
