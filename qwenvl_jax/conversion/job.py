"""One conversion as a config: what the flags and `--gin_file` both make."""

import dataclasses
import os
import re
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion.families.names import TensorNames
from qwenvl_jax.conversion.hub import local_folder
from qwenvl_jax.errors import ConfigError

_UNITS = {'': 1, 'K': 10**3, 'M': 10**6, 'G': 10**9, 'T': 10**12}

KINDS = ('from-hf', 'to-hf', 'init-stage1')


@dataclasses.dataclass(frozen=True)
class Conversion:
  """What is converted, how, and where to.

  Attributes:
    kind: 'from-hf' (the released layout to ours), 'to-hf' (back) or
      'init-stage1' (a decoder and OpenCLIP's vision transformer joined).
    source: a checkpoint folder or, but for 'to-hf', a hub id; of 'init-stage1'
      the decoder's.
    destination: a new folder.
    vision: of 'init-stage1', OpenCLIP's folder or hub id.
    dtype: to cast to; None keeps what is stored.
    keep_int4: of 'from-hf', keep the packed weights of an Int4 checkpoint at 4
      bits, for inference.
    names: what the source calls its tensors, and which of them are left out.
    vocab_size: rows of the vocabulary, for more than are stored.
    seed: of what is drawn at random.
    max_shard_size: of 'to-hf', in bytes or e.g. '500MB'.
  """

  source: str | os.PathLike
  destination: str | os.PathLike
  kind: str = 'from-hf'
  vision: str | os.PathLike | None = None
  dtype: str | None = None
  keep_int4: bool = False
  names: TensorNames = TensorNames()
  vocab_size: int | None = None
  seed: int = 0
  max_shard_size: int | str = '2GB'

  def __post_init__(self):
    start = self.kind == 'init-stage1'
    for wrong, message in (
      (self.kind not in KINDS, f'kind is none of {", ".join(KINDS)}'),
      (
        (self.vision is None) == start,
        'vision is what init-stage1 needs, and nobody else',
      ),
      (self.kind == 'to-hf' and self.vocab_size, 'to-hf keeps the vocabulary'),
      (not self.source or not self.destination, 'a folder has no name'),
      (not 0 <= self.seed < 2**63, 'seed is not within 0..2**63'),
      (not 0 < (self.vocab_size or 1) <= 2**24, 'vocab_size is beyond 2**24'),
    ):
      if wrong:
        raise ConfigError(
          f'Conversion: {message} (kind={self.kind!r}, vision={self.vision!r}, '
          f'vocab_size={self.vocab_size}, seed={self.seed})'
        )
    byte_size(self.max_shard_size)

  def __call__(
    self,
    progress: convert.Progress = lambda done, total: None,
    saved: str | None = None,
  ) -> convert.Converted:
    """Runs the conversion.

    Args:
      progress: see `convert.Progress`.
      saved: the config file that made this, to be written beside the result.

    Raises:
      CheckpointError, DataError: see `convert.from_hf`.
    """
    destination = buckets.as_path(self.destination)
    common = {'dtype': self.dtype, 'progress': progress, 'saved': saved}
    if self.kind == 'to-hf':
      return convert.to_hf(
        buckets.as_path(self.source),
        destination,
        shard_bytes=byte_size(self.max_shard_size),
        **common,
      )
    common |= {
      'names': self.names,
      'vocab_size': self.vocab_size,
      'seed': self.seed,
    }
    source = local_folder(os.fspath(self.source))
    if self.kind == 'from-hf':
      common['keep_int4'] = self.keep_int4
      return convert.from_hf(source, destination, **common)
    vision = local_folder(os.fspath(self.vision))
    return convert.init_stage1(vision, source, destination, **common)

  def saved(self, resolved: str) -> str:
    """Gives a resolved configuration in which hub ids are ids again."""
    for name in filter(None, (self.source, self.vision)):
      if not Path(name).exists():
        resolved = resolved.replace(repr(os.path.abspath(name)), repr(name))
    return resolved


def byte_size(text: int | str) -> int:
  """'2GB' to bytes, in powers of 1000, or of 1024 for '2GiB'.

  Raises:
    ConfigError: it is no size, or none that a file can have.
  """
  pattern = r'(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)B?'
  match = re.fullmatch(pattern, str(text), re.I | re.A)
  unit = match and _UNITS[match[2].upper()]
  if not match or float(match[1]) * unit < 1:
    raise ConfigError(f'{text} is no size: write e.g. 500MB')
  if match[3]:
    unit = 1024 ** (len(str(unit)) // 3)
  return int(float(match[1]) * unit)
