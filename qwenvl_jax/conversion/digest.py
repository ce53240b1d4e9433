"""What tells one checkpoint from another: a digest of its contents."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.conversion.checkpoint_io import params_folder
from qwenvl_jax.conversion.families.qwen_vl import assets

_THREADS = 8
_WEIGHTS = ('.safetensors', '.bin', '.pt')


def digest(folder: Path) -> str:
  """Returns the SHA-256 of a checkpoint's weights, config and vocabulary.

  Of a training run, those of its newest complete step, which is what opening it
  means. Every byte is read; names count, the folder's own does not.

  Args:
    folder: a checkpoint of any kind.

  Raises:
    CheckpointError: a training run without a complete step.
    OSError: a file cannot be read.
  """
  params = params_folder(folder)
  if params is None:
    names = [x for x in buckets.sizes(folder) if x.endswith(_WEIGHTS)]
    files = {name: folder / name for name in names}
  else:
    files = {f'params/{name}': params / name for name in buckets.sizes(params)}
  for name in ('config.json', assets.VOCABULARY):
    if (path := assets.find_asset(folder, name)).exists():
      files[name] = path
  order = sorted(files)

  def of_file(name: str) -> str:
    with buckets.open_regular(files[name]) as stream:
      return hashlib.file_digest(stream, 'sha256').hexdigest()

  with ThreadPoolExecutor(_THREADS) as pool:
    digests = list(pool.map(of_file, order))
  lines = (f'{name} {found}\n' for name, found in zip(order, digests))
  return hashlib.sha256(''.join(lines).encode()).hexdigest()
