"""A digest of a model's values, whatever folder and layout they are in.

Adapters name by it what they were trained on. It is of a sample of every
parameter, in float32: the released files, a conversion of them and packed
kernels beside dequantized ones have one digest; another training of the same
sizes has another.
"""

import collections
import hashlib
from pathlib import Path

import numpy as np

from qwenvl_jax.conversion import checkpoint_io
from qwenvl_jax.conversion.blocks import plan

# Values of a block; the first and the last of each tensor are read.
_BLOCK = 2**20


def digest(folder: Path) -> str:
  """Gives the digest of a checkpoint folder of any kind.

  Raises:
    CheckpointError: it is damaged.
  """
  config = checkpoint_io.read_config(folder)
  if config.decoder.int4_group is None:
    # Stored as int4 and not kept so, values are dequantized to this dtype.
    tensors, table = checkpoint_io.open_tensors(folder, config, 'float32')
  else:
    tensors, table = checkpoint_io.open_dequantized(folder, config)
  found = hashlib.blake2b(digest_size=16)
  for rule in sorted(table, key=lambda rule: rule.paths):
    blocks = iter(plan([rule], _BLOCK))
    first = next(blocks)
    for block in (first, *collections.deque(blocks, maxlen=1)):
      rows = tensors[block.name].read(block.start, block.stop)
      boxes = block.to_ours(rows.astype(np.float32, copy=False))
      for path, values in zip(block.paths, boxes, strict=True):
        found.update(f'{path} {block.box}'.encode())
        found.update(values)
  return found.hexdigest()
