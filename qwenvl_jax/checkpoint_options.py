"""Options of opening a checkpoint, the same in every command that does."""

import argparse
from typing import Any

from qwenvl_jax import api
from qwenvl_jax.errors import CheckpointError

# Those that change what a model says.
NAMES = ('dtype', 'keep_int4', 'int8')


def add_options(parser: Any) -> None:
  """Adds `--dtype`, `--keep_int4` and `--int8`."""
  parser.add_argument(
    '--dtype',
    choices=('bfloat16', 'float16', 'float32'),
    help='number format to compute in (default: that of the checkpoint)',
  )
  parser.add_argument(
    '--keep_int4',
    action='store_true',
    help='of a released Int4 folder: keep its weights at 4 bits, in half the '
    'memory, rather than dequantize them (a checkpoint converted with '
    '--keep_int4 is always used so)',
  )
  parser.add_argument(
    '--int8',
    action='store_true',
    help="round the decoder's kernels to 8 bits as they are read: half the "
    'memory of bfloat16, and nearly its answers',
  )


def load(args: argparse.Namespace, **more: Any) -> api.Handle:
  """Opens the checkpoint of a command line.

  Returns:
    A handle with a tokenizer.

  Raises:
    CheckpointError: as `api.load`, or the folder has no vocabulary.
  """
  options = {name: getattr(args, name) for name in NAMES}
  handle = api.load(args.checkpoint, **options, **more)
  if handle.tokenizer is None:
    raise CheckpointError(
      f'{args.checkpoint}: there is no vocabulary in this folder, so text '
      'cannot be read or written; copy the qwen.tiktoken that belongs to the '
      'checkpoint into it'
    )
  return handle
