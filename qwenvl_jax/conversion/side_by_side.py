"""Several low-rank adapters as one whose ranks are theirs, side by side."""

from collections.abc import Mapping

import numpy as np

from qwenvl_jax.conversion.low_rank import Base, LowRank, factor_shapes
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.lora import TARGETS, LoraConfig


def side_by_side(
  adapters: Mapping[str, LowRank], config: QwenVLConfig
) -> tuple[LowRank, dict[str, np.ndarray]]:
  """Joins adapters so that each row of a batch can use another one.

  The factors of all are concatenated along their ranks, with zeros where an
  adapter leaves a projection as it is. A row multiplies the ranks of its
  adapter by that one's scale and all others by 0, see `KVCache.ranks`.

  Args:
    adapters: by name, of one model.
    config: of the model.

  Returns:
    (the adapter of all, by name [R] float32 for `Engine.adapters`).

  Raises:
    CheckpointError: an adapter changes more than projections of the decoder.
  """
  for name, adapter in adapters.items():
    rest = [*adapter.whole, *_outside(adapter.lora)]
    if rest:
      raise CheckpointError(
        f'adapter {name!r} ({adapter.where}) also changes {", ".join(rest)}, '
        'which all requests share: open it alone (adapter=), or merge it '
        '(qwenvl-convert merge-adapter)'
      )
  ranks = [adapter.lora.rank for adapter in adapters.values()]
  ends = np.cumsum(ranks)
  lora = LoraConfig(
    rank=int(ends[-1]),
    alpha=float(ends[-1]),
    dropout=0.0,
    targets=tuple(
      name
      for name in TARGETS
      if any(name in adapter.lora.names for adapter in adapters.values())
    ),
    by_row=True,
  )
  values, rows = {}, {}
  kind = np.result_type(
    *(x.dtype for adapter in adapters.values() for x in adapter.values.values())
  )
  for path, shape in factor_shapes(config.replace(lora=lora)).items():
    joined = values[path] = np.zeros(shape, kind)
    for adapter, end in zip(adapters.values(), ends, strict=True):
      own = adapter.values.get(path)
      if own is not None:
        part = slice(end - adapter.lora.rank, end)
        at = (..., part) if path.endswith('lora_a') else (slice(None), part)
        joined[at] = own
  for (name, adapter), end in zip(adapters.items(), ends, strict=True):
    rows[name] = np.zeros(lora.rank, np.float32)
    rows[name][end - adapter.lora.rank : end] = adapter.lora.scale
  first = next(iter(adapters.values()))
  base = Base(first.base.folder, first.base.digest)
  return LowRank(lora, base, values, ', '.join(adapters)), rows


def _outside(lora: LoraConfig) -> list[str]:
  """Adapted projections that are not the decoder's."""
  return [name for name in lora.names if not name.startswith('decoder/')]
