"""`qwenvl-convert`: checkpoints from and to the released layouts."""

import argparse
import contextlib
import functools
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import filesize
from rich.progress import (
  BarColumn,
  DownloadColumn,
  TextColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)
from rich.table import Table

from qwenvl_jax import api, buckets, configuration, entry
from qwenvl_jax.conversion import (
  adapters,
  checkpoint_io,
  inspection,
  reference,
)
from qwenvl_jax.conversion.families.qwen_vl import assets
from qwenvl_jax.conversion.hub import local_folder
from qwenvl_jax.conversion.job import Conversion, byte_size
from qwenvl_jax.conversion.layout import some
from qwenvl_jax.conversion.tensors import DTYPES
from qwenvl_jax.conversion.verify import verify
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.progress import PrintableConsole, bars

# What `verify --logits` asks about its picture, and the largest difference in
# float32 that is rounding and not another model (logits are of size 10).
_QUESTION = 'Describe the image in English:'
_LOGITS_TOLERANCE = 2e-3


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  return entry.run(_run, argv, interrupted='interrupted: nothing was written')


def _run(argv: Sequence[str]) -> int:
  try:
    with buckets.refusals_told():
      if any(x.startswith(('--gin_file', '--gin.')) for x in argv):
        return _by_config(argv)
      args = _parser().parse_args(argv)
      return args.run(args)
  except BrokenPipeError:  # `entry.run` knows what it means.
    raise
  except OSError as error:
    raise CheckpointError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='qwenvl-convert',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    description=inspect.cleandoc("""
      Convert Qwen-VL checkpoints between the released PyTorch layout and the
      Orbax layout that qwenvl-train, qwenvl-chat and qwenvl_jax.load open.

      Conversions stream: they need about half a gigabyte of memory at any
      size. A destination appears when it is complete, or not at all.

      A conversion can also be a config file, which is saved beside its result:
      --gin_file and --gin.NAME=VALUE as with qwenvl-train (configs/convert/).
    """),
    epilog=inspect.cleandoc("""
      examples:
        qwenvl-convert inspect Qwen-VL-Chat
        qwenvl-convert from-hf Qwen-VL-Chat checkpoints/chat
        qwenvl-convert from-hf Qwen/Qwen-VL-Chat checkpoints/chat
        qwenvl-convert from-hf Qwen-VL-Chat-Int4 checkpoints/int4 --keep_int4
        qwenvl-convert verify Qwen-VL-Chat checkpoints/chat
        qwenvl-convert to-hf runs/stage3 release --dtype bfloat16
        qwenvl-convert init-stage1 --vision CLIP-ViT-bigG --decoder Qwen-7B \\
            checkpoints/start
        qwenvl-convert adapter-to-peft runs/mine peft --base Qwen/Qwen-VL-Chat
        qwenvl-convert merge-adapter checkpoints/chat runs/mine merged
        qwenvl-convert --gin_file=convert/chat.gin \\
            --gin.SOURCE='"Qwen-VL-Chat"' --gin.DESTINATION='"checkpoints/chat"'
    """),
  )
  commands = parser.add_subparsers(title='commands', required=True)

  def command(name, run, text, *paths):
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(run=run, kind=name)
    for path, meaning in paths:
      sub.add_argument(path, help=meaning)
    return sub

  sub = command(
    'from-hf',
    _by_flags,
    'Released layout (safetensors or .bin shards, int4 too) to Orbax.',
    (
      'source',
      'folder with config.json and the weights, or a hub id to download '
      '(Qwen/Qwen-VL-Chat)',
    ),
    ('destination', 'new folder for the converted checkpoint'),
  )
  _dtype(sub)
  sub.add_argument(
    '--keep_int4',
    action='store_true',
    help='of an int4 (GPTQ) checkpoint: keep its packed weights, for chat and '
    'evaluation in half the memory; --dtype is then of all others. '
    'Without this they are dequantized (to bfloat16), which the stages need',
  )
  sub = command(
    'to-hf',
    _by_flags,
    'A converted checkpoint or a training run to the released layout.',
    ('source', 'checkpoint folder or training run (its newest step)'),
    ('destination', 'new folder for safetensors shards, index and config'),
  )
  _dtype(sub)
  sub.add_argument(
    '--max_shard_size',
    type=_size,
    default='2GB',
    metavar='SIZE',
    help='upper bound on a shard, e.g. 500MB or 5GB (default: %(default)s)',
  )
  sub = command(
    'init-stage1',
    _by_flags,
    'Start of stage 1: OpenCLIP vision, Qwen-7B decoder, a new adapter.',
    ('destination', 'new folder for the checkpoint'),
  )
  sub.add_argument(
    '--vision',
    required=True,
    metavar='OPENCLIP',
    help='OpenCLIP folder (open_clip_config.json and the weights) or hub id',
  )
  sub.add_argument(
    '--decoder',
    dest='source',
    required=True,
    metavar='QWEN7B',
    help='Qwen-7B (or Qwen-VL) in the released layout, folder or hub id. Rows '
    'that its vocabulary lacks for image tokens are drawn at random',
  )
  sub.add_argument(
    '--seed', type=int, default=0, help='of the adapter and of new rows'
  )
  _dtype(sub)
  command(
    'adapter-to-peft',
    _adapter_to_peft,
    "A run with low-rank factors to PEFT's layout.",
    ('source', 'training run of finetune/lora.gin, or an adapter of ours'),
    ('destination', 'new folder for adapter_config.json and the tensors'),
  ).add_argument(
    '--base',
    metavar='MODEL',
    help='what adapter_config.json names as the model, e.g. Qwen/Qwen-VL-Chat '
    '(default: the folder that the run was started from)',
  )
  command(
    'adapter-from-peft',
    _adapter_from_peft,
    "PEFT's adapter (safetensors or .bin) to one of ours, bound to its base.",
    ('source', 'folder with adapter_config.json'),
    ('base', 'checkpoint folder of the model that it is for'),
    ('destination', 'new folder for the adapter'),
  )
  sub = command(
    'merge-adapter',
    _merge_adapter,
    'A model with an adapter merged into its weights; to-hf then gives the '
    'released layout. Packed int4 weights are dequantized first.',
    ('base', 'checkpoint folder of the model'),
    ('source', "training run of finetune/lora.gin, or an adapter (PEFT's too)"),
    ('destination', 'new folder for the converted checkpoint'),
  )
  _dtype(sub)
  command(
    'inspect',
    _inspect,
    'What is in a checkpoint folder of any of these kinds.',
    (
      'source',
      'checkpoint folder, training run, OpenCLIP folder, or a hub id',
    ),
  ).add_argument(
    '--headers',
    action='store_true',
    help='read headers alone; without this all values are read, and those that '
    'are not finite counted',
  )
  sub = command(
    'verify',
    _verify,
    'Compare every tensor of two checkpoints, whatever their layouts.',
    ('source', 'checkpoint folder, or a hub id'),
    (
      'destination',
      'what it was converted to: tensors of the source are cast to the dtypes '
      'of this one before they are compared',
    ),
  )
  sub.add_argument(
    '--logits',
    action='store_true',
    help='also compare logits on a fixed prompt and picture with those of the '
    'released PyTorch code, which must lie in the source folder and WILL BE '
    'RUN. Needs torch, transformers and, for the release, 60 GB of memory',
  )
  return parser


def _dtype(sub):
  sub.add_argument(
    '--dtype',
    choices=sorted(DTYPES),
    help='cast to this dtype (default: keep what is stored, bit for bit)',
  )


def _size(text: str) -> int:
  try:
    return byte_size(text)
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


@contextlib.contextmanager
def _progress(text: str):
  """A bar over bytes; yields what to call with (done, total)."""
  columns = (
    TextColumn('{task.description}'),
    BarColumn(),
    DownloadColumn(),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  with bars(PrintableConsole(stderr=True), *columns) as progress:
    yield functools.partial(progress, text)


def _convert(job: Conversion, resolved: str | None = None) -> int:
  """Runs a conversion and says what it made."""
  with _progress('converting') as progress:
    made = job(progress, None if resolved is None else job.saved(resolved))
  print(f'wrote {job.destination}')
  if job.kind == 'init-stage1':
    print(f'the adapter is new (seed {job.seed})')
  if made.new_rows:
    print(
      f'the vocabulary grew by {made.new_rows} rows to '
      f'{made.config.decoder.vocab_size}; they are new as well (seed '
      f'{job.seed})'
    )
  for note in made.notes:
    print(f'note: {note}', file=sys.stderr)
  return 0


def _by_config(argv: Sequence[str]) -> int:
  """Runs the conversion that config files describe."""
  arguments = entry.parser('qwenvl-convert', 'A conversion by config.')
  flags, bindings = entry.parse(arguments, argv)
  if not flags.gin_file:
    raise ConfigError(
      'no --gin_file given: name the config file of a conversion, e.g. '
      '--gin_file=convert/chat.gin'
    )
  configuration.load(flags.gin_file, bindings)
  return _convert(configuration.build(Conversion), configuration.resolved())


def _by_flags(args) -> int:
  return _convert(entry.from_flags(Conversion, args))


def _adapter_to_peft(args) -> int:
  source, destination = map(buckets.as_path, (args.source, args.destination))
  return _say(adapters.to_peft(source, destination, args.base), destination)


def _adapter_from_peft(args) -> int:
  source, base, destination = map(
    buckets.as_path, (args.source, args.base, args.destination)
  )
  return _say(adapters.from_peft(source, base, destination), destination)


def _say(adapter: adapters.LowRank, destination: Path) -> int:
  size = sum(x.nbytes for x in adapter.values.values())
  whole = f'; whole: {", ".join(adapter.whole)}' if adapter.whole else ''
  print(
    f'wrote {destination}: rank {adapter.lora.rank}, '
    f'{", ".join(adapter.lora.names)}{whole}; {filesize.decimal(size)}'
  )
  return 0


def _merge_adapter(args) -> int:
  base, source, destination = map(
    buckets.as_path, (args.base, args.source, args.destination)
  )
  with _progress('merging') as progress:
    made = adapters.merge(base, source, destination, args.dtype, progress)
  print(f'wrote {destination}')
  for note in made.notes:
    print(f'note: {note}', file=sys.stderr)
  return 0


def _inspect(args) -> int:
  with _progress('reading') as progress:
    report = inspection.inspect(
      local_folder(args.source), progress, values=not args.headers
    )
  console = PrintableConsole(highlight=False, markup=False)
  console.print(f'{report.family} ({report.layout})')
  for line in report.sizes:
    console.print(f'  {line}')
  table = Table()
  for column in ('part', 'tensors', 'parameters', 'billions', 'size', 'dtypes'):
    table.add_column(column, justify='left' if column == 'part' else 'right')
  for part in report.parts:
    table.add_row(
      part.name,
      f'{part.tensors:,}',
      f'{part.parameters:,}',
      f'{part.parameters / 1e9:.2f}',
      filesize.decimal(part.bytes),
      ', '.join(part.dtypes),
    )
  console.print(table)
  for note in report.notes:
    console.print(note)
  console.print(
    f'files beside config.json: {", ".join(report.extras) or "none"}'
  )
  for problem in report.problems:
    print(f'error: {problem}', file=sys.stderr)
  if report.problems:
    return 2
  print('every tensor that the config asks for is there, and no other')
  return 0


def _verify(args) -> int:
  source, destination = map(local_folder, (args.source, args.destination))
  with _progress('comparing') as progress:
    found = verify(source, destination, progress)
  how = 'bit for bit'
  if found.cast:
    how = 'after casting ' + ', '.join(f'{a} to {b}' for a, b in found.cast)
  equal = found.tensors - len(found.differing)
  print(
    f'{equal:,} of {found.tensors:,} tensors ({found.values:,} values) are '
    f'equal {how}'
  )
  for title, names in (
    (f'only in {source}', found.missing),
    (f'only in {destination}', found.added),
  ):
    if names:
      print(f'{title}: {len(names)} tensors: {some(names, 8)}')
  if found.differing:
    texts = [f'{k} (by up to {v:g})' for k, v in found.differing.items()]
    print(f'{len(texts)} tensors differ: {some(texts, 8)}')
  for line in (*found.settings, *found.notes):
    print(line)
  same = found.same
  if args.logits:
    same &= _compare_logits(source, destination)
  return 0 if same else 1


def _compare_logits(source: Path, destination: Path) -> bool:
  """Compares with the released code in `source`, and says what it found."""
  if not reference.has_released_code(source):
    raise CheckpointError(
      f'{source} has no modeling_qwen.py: put the released code there, or '
      'leave out --logits'
    )
  config = checkpoint_io.read_config(destination)
  tokenizer = assets.read_tokenizer(destination, config)
  if tokenizer is None:
    raise CheckpointError(
      f'{destination} has no {assets.VOCABULARY}: --logits needs one'
    )
  with reference.fixed_picture() as picture:
    text = f'Picture 1: <img>{picture}</img>\n{_QUESTION}'
    tokens = np.asarray([tokenizer.encode(text)], np.int64)
    wanted = reference.released_logits(source, tokens)
    ours = api.load(destination, dtype='float32')
    pixels = ours.preprocess(str(picture))
    logits = np.asarray(ours.logits(tokens.astype(np.int32), pixels[None]))
  error = float(np.abs(logits - wanted).max())
  agree = float((logits.argmax(-1) == wanted.argmax(-1)).mean())
  print(
    f'logits: {tokens.shape[1]} positions, largest difference {error:.2e} of '
    f'{np.abs(wanted).max():.1f}, best token the same at {agree:.1%}'
  )
  return error <= _LOGITS_TOLERANCE


if __name__ == '__main__':
  sys.exit(main())
