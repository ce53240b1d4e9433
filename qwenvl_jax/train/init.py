"""Where a run's first parameters come from."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax import buckets
from qwenvl_jax.conversion.checkpoint_io import read_config, read_params
from qwenvl_jax.errors import CheckpointError
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
  """

  params: str | os.PathLike | None = None
  vision: str | os.PathLike | None = None
  adapter: str | os.PathLike | None = None
  decoder: str | os.PathLike | None = None

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
    objective: the model.
    target: `ShapeDtypeStruct`s with shardings, from `abstract_params`.
    init: see `InitFrom`.
    seed: of what starts random.

  Returns:
    Nested dict of arrays like `target`.

  Raises:
    CheckpointError: a folder lacks a part, or holds another shape of it.
  """
  sources = {}
  for part in target:
    sources.setdefault(init.folder(part), []).append(part)
  params = {}
  for folder, parts in sources.items():
    if folder is None:
      params |= random_params(objective, target, seed, parts)
    else:
      wanted = {part: target[part] for part in parts}
      params |= read_parts(buckets.as_path(folder), wanted)
  return {part: params[part] for part in target}


def read_parts(folder: Path, target: Any) -> Any:
  """Reads the parts of the tree that `target` names from one folder."""
  wanted, config = flatten(target), read_config(folder)
  if config.decoder.int4_group is not None:
    raise CheckpointError(
      f'{folder} keeps int4 weights, which cannot be trained: convert the Int4 '
      'release once more with qwenvl-convert from-hf, without --keep_int4 '
      '(qwenvl-convert to-hf makes it from this folder)'
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
