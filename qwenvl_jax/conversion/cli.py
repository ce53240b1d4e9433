"""`qwenvl-convert`: checkpoints from and to the released layouts."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qwenvl_jax.conversion import convert
from qwenvl_jax.conversion import folder as folders
from qwenvl_jax.conversion.writer import DTYPES
from qwenvl_jax.errors import QwenVLError


def main(argv: list[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  args = _parser().parse_args(argv)
  try:
    return args.run(args)
  except QwenVLError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='qwenvl-convert',
    description='Convert Qwen-VL checkpoints between the released PyTorch '
    'layout and the Orbax layout that qwenvl-train, qwenvl-chat and '
    'qwenvl_jax.load open.',
  )
  commands = parser.add_subparsers(title='commands', required=True)

  def command(name, run, text, *paths):
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run)
    for path, meaning in paths:
      sub.add_argument(path, type=Path, help=meaning)
    return sub

  sub = command(
    'from-hf',
    _from_hf,
    'Released layout (safetensors or .bin shards) to Orbax.',
    ('source', 'folder with config.json and the weights'),
    ('destination', 'new folder for the converted checkpoint'),
  )
  _dtype(sub)
  sub = command(
    'to-hf',
    _to_hf,
    'A converted checkpoint or a training run to the released layout.',
    ('source', 'checkpoint folder or training run (its newest step)'),
    ('destination', 'new folder for safetensors shards, index and config'),
  )
  _dtype(sub)
  sub.add_argument(
    '--shard-gib',
    type=float,
    default=2.0,
    help='upper bound on one shard in GiB (default: 2)',
  )
  sub = command(
    'init-stage1',
    _init_stage1,
    'Start of stage 1: OpenCLIP vision, Qwen-7B decoder, a new adapter.',
  )
  sub.add_argument(
    '--vision',
    type=Path,
    required=True,
    help='OpenCLIP folder: open_clip_config.json and the weights',
  )
  sub.add_argument(
    '--decoder',
    type=Path,
    required=True,
    help='Qwen-7B (or Qwen-VL) folder in the released layout',
  )
  sub.add_argument('destination', type=Path, help='new checkpoint folder')
  sub.add_argument('--seed', type=int, default=0, help='of the new adapter')
  command(
    'inspect',
    _inspect,
    'What is in a checkpoint folder of any of these kinds.',
    ('source', 'checkpoint folder'),
  )
  return parser


def _dtype(sub):
  sub.add_argument(
    '--dtype',
    choices=sorted(DTYPES),
    help='cast to this dtype (default: keep what is stored, bit for bit)',
  )


def _from_hf(args) -> int:
  convert.from_hf(args.source, args.destination, args.dtype)
  print(f'wrote {args.destination}')
  return 0


def _to_hf(args) -> int:
  convert.to_hf(
    args.source, args.destination, args.dtype, int(args.shard_gib * 1024**3)
  )
  print(f'wrote {args.destination}')
  return 0


def _init_stage1(args) -> int:
  convert.init_stage1(args.vision, args.decoder, args.destination, args.seed)
  print(f'wrote {args.destination}')
  return 0


def _inspect(args) -> int:
  report = folders.inspect(args.source)
  table = Table(title=f'{args.source} ({report.kind})')
  for column in ('part', 'tensors', 'parameters', 'GiB', 'dtypes'):
    table.add_column(column, justify='left' if column == 'part' else 'right')
  for part in report.parts:
    table.add_row(
      part.name,
      str(part.tensors),
      f'{part.parameters:,}',
      f'{part.bytes / 1024**3:.3f}',
      ', '.join(part.dtypes),
    )
  Console().print(table)
  print(report.problem or 'every tensor that config.json asks for is there')
  return 2 if report.problem else 0


if __name__ == '__main__':
  sys.exit(main())
