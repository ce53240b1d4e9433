"""Compares two checkpoints tensor by tensor, whatever their layouts."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from qwenvl_jax import buckets
from qwenvl_jax.conversion import checkpoint_io, finite, layout
from qwenvl_jax.conversion.blocks import Block, plan
from qwenvl_jax.conversion.convert import Progress, copy
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.tensors import narrow
from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.model.config import QwenVLConfig


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What `verify` found.

  Attributes:
    tensors: how many both have, under their released names.
    values: how many values those have.
    missing: names that only the first has.
    added: names that only the second has.
    differing: name to the largest absolute difference.
    cast: (from, to) dtypes, if the second is stored in another one; values are
      then compared as a cast of the first.
    settings: what differs in config.json or the vocabulary.
    notes: what else to say, such as values that are not finite in the first.
  """

  tensors: int
  values: int
  missing: tuple[str, ...]
  added: tuple[str, ...]
  differing: dict[str, float]
  cast: tuple[tuple[str, str], ...]
  settings: tuple[str, ...]
  notes: tuple[str, ...] = ()

  @property
  def same(self) -> bool:
    return not (self.missing or self.added or self.differing or self.settings)


def verify(
  first: Path, second: Path, progress: Progress = lambda done, total: None
) -> Comparison:
  """Compares every tensor of two checkpoint folders, bit for bit.

  Int4 weights are compared packed if both have them so, else dequantized.

  Args:
    first: a checkpoint folder of any kind.
    second: another.
    progress: see `convert.Progress`.

  Raises:
    CheckpointError: one of them is incomplete or damaged.
  """
  configs = _packed_configs(first, second)
  if configs is None:
    configs = [checkpoint_io.read_config(folder) for folder in (first, second)]
    opened = list(map(checkpoint_io.open_dequantized, (first, second), configs))
    configs = list(map(checkpoint_io.dequantized, configs))
  else:
    opened = map(checkpoint_io.open_tensors, (first, second), configs)
  (a, table), (b, other) = opened
  shapes, others = layout.released_shapes(table), layout.released_shapes(other)
  shared = [
    rule
    for rule in table
    if all(others.get(n) == rule.shape for n in rule.released_names())
  ]
  names, differing = layout.released_shapes(shared), {}

  def compare(block: Block, rows: np.ndarray):
    two = b[block.name].read(block.start, block.stop)
    difference = _difference(block.name, rows, two)
    if difference is not None:
      before = differing.get(block.name, 0.0)
      differing[block.name] = max(before, difference)

  counts = copy(a, plan(shared), compare, progress)
  casts = {(a[name].dtype.name, b[name].dtype.name) for name in names}
  return Comparison(
    tensors=len(names),
    values=sum(map(math.prod, names.values())),
    missing=tuple(sorted(shapes.keys() - names.keys())),
    added=tuple(sorted(others.keys() - names.keys())),
    differing=dict(sorted(differing.items())),
    cast=tuple(sorted((x, y) for x, y in casts if x != y)),
    settings=tuple(_settings(first, second, *configs)),
    notes=tuple(filter(None, [finite.describe(counts)])),
  )


def _packed_configs(first: Path, second: Path) -> list[QwenVLConfig] | None:
  """Configs for reading both with packed kernels, None if one has none."""
  try:
    return [
      checkpoint_io.read_config(f, keep_int4=True) for f in (first, second)
    ]
  except QwenVLError:
    return None  # What is damaged says so again when it is read otherwise.


def _difference(name: str, one: np.ndarray, two: np.ndarray) -> float | None:
  """None if two is one, bit for bit, in its own dtype."""
  try:
    cast = narrow(name, one, two.dtype)
  except OverflowError:
    return float('inf')
  kind = f'u{two.dtype.itemsize}'
  if np.array_equal(cast.view(kind), two.view(kind)):
    return None
  wide = np.abs(cast.astype(np.float64) - two.astype(np.float64))
  return float(wide.max())


def _settings(first, second, a, b):
  if a != b:
    for part in ('vision', 'adapter', 'decoder'):
      x, y = getattr(a, part), getattr(b, part)
      for field in dataclasses.fields(x):
        one, two = getattr(x, field.name), getattr(y, field.name)
        if one != two:
          yield f'config.json: {part} {field.name} is {one!r} and {two!r}'
    if a.image_start_id != b.image_start_id:
      yield (
        f'config.json: image_start_id is {a.image_start_id} and '
        f'{b.image_start_id}'
      )
  vocabularies = [
    assets.find_asset(folder, assets.VOCABULARY) for folder in (first, second)
  ]
  texts = [buckets.read(p, 2**28) if p.exists() else None for p in vocabularies]
  if texts[0] != texts[1]:
    yield f'{assets.VOCABULARY} is not the same in both'
