"""Checkpoints by folder, or by their name on the Hugging Face hub."""

import re
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.errors import CheckpointError

_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')

_FILES = (
  '*.json',
  '*.safetensors',
  '*.bin',
  '*.tiktoken',
  '*.py',
  '*.ttf',
  'LICENSE*',
  'NOTICE*',
)


def local_folder(source: str) -> Path:
  """The folder of a checkpoint, downloaded first if it is a hub id.

  Args:
    source: an existing folder, or an id like 'Qwen/Qwen-VL-Chat'. A folder of
      that name goes first.

  Raises:
    CheckpointError: it is neither, `huggingface_hub` is not installed, or the
      download failed.
  """
  path = buckets.as_path(source)
  if buckets.in_bucket(source) or path.exists():
    return path
  if not _ID.fullmatch(source):
    raise CheckpointError(
      f'{source} does not exist, and is no hub id either (those look like '
      'Qwen/Qwen-VL-Chat)'
    )
  try:
    import huggingface_hub
  except ImportError as error:
    raise CheckpointError(
      f'{source} does not exist as a folder. To download it from the hub, '
      "install huggingface_hub: pip install 'qwenvl_jax[hub]'"
    ) from error
  try:
    return Path(
      huggingface_hub.snapshot_download(source, allow_patterns=list(_FILES))
    )
  except Exception as error:  # Network, permissions, names: all are foreseen.
    reason = str(error).strip().partition('\n')[0]
    raise CheckpointError(
      f'{source} does not exist as a folder and cannot be downloaded from the '
      f'hub: {reason or type(error).__name__}; check the name and the network, '
      'or name a folder that holds it'
    ) from error
