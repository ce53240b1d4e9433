"""Options of opening a checkpoint, the same in every command that does."""

import argparse
from typing import Any

from qwenvl_jax import api
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.infer.engine import Engine, EngineConfig

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


def add_engine_options(parser: Any, slots: int) -> None:
  """Adds `--slots` of so many by default, `--max_len` and `--cache_dtype`."""
  parser.add_argument(
    '--slots',
    type=_slots,
    default=slots,
    metavar='N',
    help='answers at a time (default: %(default)s)',
  )
  parser.add_argument(
    '--max_len',
    type=int,
    metavar='N',
    help='tokens of a prompt and its answer (default: what training rows have)',
  )
  parser.add_argument(
    '--cache_dtype', choices=('int8',), help='of the key-value cache'
  )


def _slots(text: str) -> int:
  number = int(text)
  if number < 1:
    raise ConfigError(f'--slots={number}: must be at least 1')
  return number


def make_engine(
  args: argparse.Namespace, handle: api.QwenVLModel, read_rows: int = 1
) -> Engine:
  """Makes the engine that `add_engine_options` asks for."""
  sizes = EngineConfig(
    slots=args.slots,
    max_len=args.max_len or handle.config.decoder.seq_length,
    read_rows=min(args.slots, read_rows),
    cache_dtype=args.cache_dtype,
  )
  return handle.engine(sizes)


def load(args: argparse.Namespace, **more: Any) -> api.QwenVLModel:
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
