"""Where a run's first parameters come from."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax import buckets
from qwenvl_jax.conversion.adapters import open_adapter
from qwenvl_jax.conversion.checkpoint_io import read_config, read_params
from qwenvl_jax.conversion.layout import is_packed
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.lora import is_factor
from qwenvl_jax.train.objective import Objective
from qwenvl_jax.train.optimizer import flatten, unflatten
from qwenvl_jax.train.state import random_params


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """Checkpoint folders to start from; a part that none gives starts random.

  Each may be a training run, a checkpoint folder of ours or of the released
  layout (Qwen-VL, Qwen-7B for the decoder, OpenCLIP for vision).

  Attributes:
    params: for every part: how stages 2 and 3 start.
    vision: for the vision transformer, before `params`.
    adapter: for the adapter, before `params`.
    decoder: for the decoder, before `params`.
    adapted: a low-rank adapter to go on from, of PEFT or of ours; it must be
      one of `params`. None starts new factors.
  """

  params: str | os.PathLike | None = None
  vision: str | os.PathLike | None = None
  adapter: str | os.PathLike | None = None
  decoder: str | os.PathLike | None = None
  adapted: str | os.PathLike | None = None

  def folder(self, part: str) -> str | os.PathLike | None:
    """The folder that a part of the tree comes from."""
    own = {
      'vision': self.vision,
      'adapter': self.adapter,
      'decoder': self.decoder,
    }
    return own.get(part) or self.params


def initial_params(
  objective: Objective, target: Any, init: InitFrom, seed: int
) -> Any:
  """The parameters before step 0, each in its place and dtype.

  Args:
    target: `ShapeDtypeStruct`s with shardings, from `abstract_params`.

  Returns:
    Nested dict of arrays like `target`.

  Raises:
    CheckpointError: a folder lacks a part, or holds another shape of it.
  """
  flat = flatten(target)
  factors = {path: leaf for path, leaf in flat.items() if is_factor(path)}
  rest = unflatten({p: leaf for p, leaf in flat.items() if p not in factors})
  sources = {}
  for part in rest:
    sources.setdefault(init.folder(part), []).append(part)
  params = {}
  for folder, parts in sources.items():
    wanted = {part: rest[part] for part in parts}
    if folder is None:
      params |= random_params(objective, wanted, seed)
    else:
      params |= read_parts(buckets.as_path(folder), wanted, objective.config)
  found = flatten(params)
  if factors:
    found |= flatten(random_params(objective, unflatten(factors), seed))
  if init.adapted is not None:
    found |= _adapted(init, objective.config, flat)
  return unflatten({path: found[path] for path in flat})


def _adapted(init: InitFrom, config: QwenVLConfig, target: dict) -> dict:
  """The values of an adapter, in the places and dtypes of `target`."""
  folder = buckets.as_path(init.adapted)
  base = buckets.as_path(init.params)
  adapter = open_adapter(folder, base, config)
  for name in ('names', 'rank', 'scale'):
    wanted, found = (getattr(x, name) for x in (config.lora, adapter.lora))
    if wanted != found:
      raise CheckpointError(
        f'{folder} (InitFrom.adapted) has {name} {found}, but '
        f'QwenVLConfig.lora has {wanted}: set LoraConfig.rank, alpha and '
        'targets to those of the adapter'
      )
  return {
    path: jax.device_put(x.astype(target[path].dtype), target[path].sharding)
    for path, x in adapter.values.items()
  }


def read_parts(folder: Path, target: Any, model: QwenVLConfig) -> Any:
  """Reads the parts of the tree that `target` names from one folder.

  Raises:
    CheckpointError: they are not there, or of other shapes or bits.
  """
  wanted, config = flatten(target), read_config(folder)
  if any(map(is_packed, wanted)):
    config = read_config(folder, keep_int4=True)
    for name in ('int4_group', 'int4_zero_offset'):
      stored = getattr(config.decoder, name)
      if stored != getattr(model.decoder, name):
        raise CheckpointError(
          f'{folder} has {name}={stored}: set DecoderConfig.{name} to that'
        )
  elif config.decoder.int4_group is not None:
    raise CheckpointError(
      f'{folder} keeps int4 weights, beside which low-rank factors can be '
      'trained (finetune/qlora.gin), but which cannot be trained themselves: '
      'convert the Int4 release once more with qwenvl-convert from-hf, without '
      '--keep_int4 (qwenvl-convert to-hf makes it from this folder)'
    )
  found = read_params(
    folder,
    config,
    shardings=jax.tree.map(lambda t: t.sharding, target),
    keep=lambda path: path in wanted,
  )
  found = flatten(found)
  _check(folder, {k: v.shape for k, v in found.items()}, wanted)
  # Cast where the leaf lives; one at a time, the stored copy is freed.
  for path, leaf in wanted.items():
    found[path] = found[path].astype(leaf.dtype)
  return unflatten({path: found[path] for path in wanted})


def _check(folder: Path, found: dict, wanted: dict) -> None:
  missing = sorted(wanted.keys() - found.keys())
  if missing:
    parts = sorted({path.split('/')[0] for path in missing})
    raise CheckpointError(
      f'{folder} lacks {len(missing)} parameters of {", ".join(parts)}, e.g. '
      f'{", ".join(missing[:3])}: take {" and ".join(parts)} from another '
      f'folder (InitFrom.{parts[0]}) or leave it out to start it random'
    )
  wrong = [
    f'{path} is {list(found[path])}, not {list(leaf.shape)}'
    for path, leaf in wanted.items()
    if found[path] != leaf.shape
  ]
  if wrong:
    more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
    raise CheckpointError(
      f'{folder} is of a model of other sizes than this config: '
      f'{"; ".join(wrong[:5])}{more}'
    )
