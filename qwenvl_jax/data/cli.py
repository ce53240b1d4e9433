"""`qwenvl-data`: what data there is, preparing it, looking at it."""

import argparse
import functools
import pathlib
import re
import sys
from collections.abc import Sequence

import rich.table

from qwenvl_jax import buckets, configuration, entry
from qwenvl_jax.data import (
  catalogue,
  pipeline,
  prepare,
  shards,
  show,
  sources,
  storage,
)
from qwenvl_jax.data.cleaning import cli as cleaning_cli
from qwenvl_jax.data.making import cli as making_cli
from qwenvl_jax.data.record_errors import DROPPED, REPAIRED, ErrorBudget
from qwenvl_jax.errors import ConfigError, DataError, did_you_mean
from qwenvl_jax.progress import PrintableConsole, bars

_EPILOG = """\
examples:
  qwenvl-data list
  qwenvl-data list --name vqav2
  qwenvl-data prepare scenes --data_dir data
  qwenvl-data prepare vqav2 --manual_dir ~/downloads/vqav2 --data_dir data
  qwenvl-data prepare my_chats --format conversations --manual_dir ~/chats
  qwenvl-data prepare mine --format csv --manual_dir ~/mine
  qwenvl-data show scenes --data_dir data --output rows.html
  qwenvl-data show --gin_file=configs/stage2.gin --n 20 --gin.DATA='"data"'
  qwenvl-data make-ocr --kind pages --n 1000 data/ocr_pages
  qwenvl-data clean --help
"""

# Made here or read from a package: nothing has to be downloaded.
_OWN = ('scenes', 'easy_vqa')

# Commands with a command line of their own.
_JOBS = {
  'clean': (cleaning_cli.command, 'clean picture-text pairs (Appendix A)'),
  'make-ocr': (making_cli.command, 'make pages with text, to learn reading'),
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  return entry.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
  console = PrintableConsole()
  if argv and argv[0] in _JOBS:
    _JOBS[argv[0]][0](argv[1:], console)
    return
  arguments, bindings = entry.parse(_parser(), argv)
  arguments.bindings = bindings
  with buckets.refusals_told():
    arguments.run(arguments, console)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='qwenvl-data',
    description='Lists, prepares and shows the data to train on.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(title='commands', required=True)
  shared = argparse.ArgumentParser(add_help=False)
  shared.add_argument(
    '--data_dir',
    metavar='DIR',
    help=f'where the data is (default: {sources.default_data_dir()})',
  )
  command = commands.add_parser(
    'list', parents=[shared], help='what there is, and what is prepared'
  )
  command.add_argument(
    '--name', help='tell all about one data set: where to get it, its licence'
  )
  command.set_defaults(run=_list)

  command = commands.add_parser(
    'prepare', parents=[shared], help='write a data set to the data folder'
  )
  command.add_argument('name', help='as `qwenvl-data list` shows it, or new')
  command.add_argument(
    '--manual_dir',
    metavar='DIR',
    help='the folder that you downloaded the data set to',
  )
  command.add_argument(
    '--format',
    choices=sorted(catalogue.FORMATS),
    help='how the files of data of your own are written',
  )
  command.add_argument(
    '--split', default='train', help='name of the split (with --format)'
  )
  command.add_argument(
    '--workers', type=int, default=1, help='processes that write shards'
  )
  command.add_argument(
    '--max_bad',
    type=float,
    default=ErrorBudget().share,
    metavar='SHARE',
    help='share of records that may be dropped (default: %(default)s); judged '
    f'from {ErrorBudget().after:,} records on, and at the end',
  )
  command.add_argument(
    '--again',
    action='store_true',
    help='write all shards again, not only those whose input has changed',
  )
  command.add_argument(
    '--config', default='default', help="'default' or 'small' (scenes)"
  )
  command.add_argument(
    '--vocabulary',
    metavar='FILE',
    help='the .tiktoken file to reduce (default: the released vocabulary)',
  )
  command.set_defaults(run=_prepare)

  command = commands.add_parser(
    'show',
    parents=[shared],
    help='write a page of training rows as the model gets them',
  )
  command.add_argument(
    'name',
    nargs='?',
    metavar='{' + ','.join(_OWN) + '}',
    help='a data set of the quickstart; anything else by --gin_file',
  )
  command.add_argument(
    '--gin_file',
    action='append',
    default=[],
    metavar='FILE',
    help='the config of a stage, e.g. configs/stage2.gin: its very rows; '
    '--gin.NAME=VALUE overrides values as in qwenvl-train',
  )
  command.add_argument(
    '--config', default='default', help="'default' or 'small' (scenes)"
  )
  command.add_argument(
    '--split', default='train', help='which part (default: %(default)s)'
  )
  command.add_argument(
    '--tasks',
    default='questions',
    choices=['questions', 'chats', 'words'],
    help='stages 1 and 2, stage 3, or pictures written as words',
  )
  command.add_argument(
    '--n', '--rows', dest='rows', type=int, default=12, help='how many rows'
  )
  command.add_argument('--seed', type=int, default=0, help='of the choice')
  command.add_argument(
    '--output',
    type=pathlib.Path,
    default=pathlib.Path('rows.html'),
    help='the page (default: %(default)s)',
  )
  command.set_defaults(run=_show)
  for name, (_, what) in _JOBS.items():
    commands.add_parser(name, help=what, add_help=False)
  return parser


def _list(arguments, console):
  if arguments.name:
    _describe(arguments.name, arguments.data_dir, console)
    return
  base = sources.data_path(arguments.data_dir)
  table = rich.table.Table(title=str(base))
  for column in ('name', 'task', 'prepared', 'what'):
    table.add_column(column, overflow='fold')
  for row in _own_rows(arguments.data_dir):
    table.add_row(*row)
  known = list(catalogue.DATA_SETS)
  extra = {x.parents[1].name for x in base.glob(f'*/*/{storage.INFO}')}
  for name in [*known, *sorted(extra - {*known, *_OWN})]:
    data_set = catalogue.DATA_SETS.get(name)
    about = (data_set.task, data_set.size) if data_set else ('', '')
    state = _state(storage.folder(base, name))
    table.add_row(name, about[0], state or 'no', about[1])
  console.print(table)
  # Not in the table, which would break addresses to fit the terminal.
  console.print('where to get them:')
  for name, data_set in catalogue.DATA_SETS.items():
    _print_whole(console, f'  {name:<14} {data_set.url}')
  console.print(
    '`qwenvl-data list --name NAME` tells what to download and under which '
    'licence.'
  )


def _state(folder) -> str:
  sizes = storage.split_sizes(folder).items()
  return '\n'.join(f'{split}: {count:,}' for split, count in sizes)


def _own_rows(data_dir):
  what = 'composed scenes, boxes and names, English and Chinese (made here)'
  configs = sources.prepared_configs(data_dir)
  if not configs:
    yield 'scenes', 'all', 'not prepared', what
  for config in configs:
    name = 'scenes' if config == 'default' else f'scenes ({config})'
    yield name, 'all', _state(sources.scenes_folder(data_dir, config)), what
  counts = {x: len(sources.EasyVqa(x).open()) for x in ('train', 'test')}
  state = '\n'.join(f'{split}: {count:,}' for split, count in counts.items())
  what = 'easy-VQA 1.0: questions about shapes (MIT; the installed package)'
  yield 'easy_vqa', 'vqa', state, what


def _print_whole(console, line):
  """A line that is not broken, so that what it names can be copied."""
  console.print(line, soft_wrap=True, highlight=False, markup=False)


def _describe(name, data_dir, console):
  if name in _OWN:
    console.print(f'{name}: nothing to download; see `qwenvl-data list`')
    return
  folder = storage.folder(sources.data_path(data_dir), name)
  state = _state(folder)
  if name not in catalogue.DATA_SETS and state:
    console.print(f'{name}: your own, in {folder}; records:\n{state}')
    return
  data_set = _known(name)
  for label, text in (
    ('task', data_set.task),
    ('size', data_set.size),
    ('from', data_set.url),
    ('licence', data_set.licence),
    ('put into --manual_dir', data_set.put),
    ('splits', ', '.join(data_set.splits)),
  ):
    _print_whole(console, f'{label}: {text}')
  files = {x for reader in data_set.splits.values() for x in reader.files}
  if files:
    console.print('\nfiles and folders it reads:')
  for file in sorted(files):
    _print_whole(console, f'  {file}')
  console.print(f'\nqwenvl-data prepare {name} --manual_dir FOLDER')


def _known(name):
  if name in catalogue.DATA_SETS:
    return catalogue.DATA_SETS[name]
  names = [*catalogue.DATA_SETS, *_OWN]
  parts = [x for x in names if name in x]
  raise ConfigError(
    f'there is no data set {name!r}{did_you_mean(name, names, parts)}; '
    '`qwenvl-data list` names all; for data of your own say how it is written '
    'with --format'
  )


def _prepare(arguments, console):
  if arguments.name == 'easy_vqa':
    count = sum(len(sources.EasyVqa(x).open()) for x in ('train', 'test'))
    console.print(
      f'easy_vqa needs no preparation: its {count:,} pictures are read from '
      'the installed package.'
    )
    return
  if arguments.name != 'scenes':
    _prepare_public(arguments, console)
    return
  with bars(console) as progress:
    folder = prepare.scenes(
      arguments.data_dir,
      arguments.config,
      arguments.vocabulary,
      progress,
      arguments.again,
    )
  console.print(f'{folder}: scenes\n{_state(folder)}')
  console.print(f'vocabulary: {sources.small_vocabulary(arguments.data_dir)}')


def _prepare_public(arguments, console):
  name = arguments.name
  if arguments.format:
    for what, text in (('data set', name), ('split', arguments.split)):
      if not re.fullmatch(r'[a-z][A-Za-z0-9_]{0,99}', text):
        raise ConfigError(
          f'{text!r} cannot name a {what}: it takes a small letter, and then '
          'letters, digits and _'
        )
    readers = {arguments.split: catalogue.FORMATS[arguments.format]}
    about = {}
  else:
    data_set = _known(name)
    readers = data_set.splits
    about = {'homepage': data_set.url, 'license': data_set.licence}
  if not arguments.manual_dir:
    raise ConfigError(
      f'{name} has to be downloaded by hand (`qwenvl-data list --name {name}` '
      'tells where); then name the folder with --manual_dir'
    )
  with bars(console) as progress:
    report = shards.prepare(
      name,
      readers,
      arguments.manual_dir,
      sources.disk_path(arguments.data_dir),
      workers=arguments.workers,
      limit=ErrorBudget(share=arguments.max_bad),
      again=arguments.again,
      progress=progress,
      say=functools.partial(_print_whole, console),
      # Who has millions of pictures hardly holds single ones out.
      with_digests=bool(arguments.format),
      **about,
    )
  table = rich.table.Table(title=str(report.folder))
  for column in ('split', 'records', 'shards', 'dropped', 'repaired'):
    table.add_column(column)
  for split, lengths in report.lengths.items():
    dropped, repaired = (
      '\n'.join(
        f'{count:,} {reason}: {rules[reason]}'
        for reason, count in report.counts.of(split, kind).items()
      )
      for kind, rules in (('dropped', DROPPED), ('repaired', REPAIRED))
    )
    table.add_row(
      split, f'{sum(lengths):,}', str(len(lengths)), dropped, repaired
    )
  console.print(table)


def _show(arguments, console):
  if arguments.rows < 1:
    raise ConfigError(f'--n {arguments.rows}: at least one row')
  if arguments.gin_file:
    page = _stage_page(arguments)
  elif arguments.name not in (None, *_OWN):
    raise ConfigError(
      f'{arguments.name}: its rows are those of a stage that reads it: '
      'qwenvl-data show --gin_file=FILE; of your own data --gin_file='
      f'finetune/lora.gin --gin.DATA_SET=\'"{arguments.name}"\' '
      '--gin.BASE=\'"CHECKPOINT"\''
    )
  elif arguments.name:
    page = show.page(
      name=arguments.name,
      data_dir=arguments.data_dir,
      config=arguments.config,
      split=arguments.split,
      kind=arguments.tasks,
      rows=arguments.rows,
      seed=arguments.seed,
    )
  else:
    raise ConfigError(
      f'say what to show: {" or ".join(_OWN)}, or the config of a stage with '
      '--gin_file'
    )
  try:
    buckets.write(arguments.output, page)
  except OSError as error:
    raise DataError(
      f'cannot write {arguments.output} ({error.strerror}); name another file '
      'with --output'
    ) from error
  console.print(f'{arguments.output}: open it in a browser')


def _stage_page(arguments) -> str:
  bindings = arguments.bindings
  if arguments.data_dir:
    bindings = [*bindings, f'DATA={arguments.data_dir!r}']
  configuration.load(arguments.gin_file, bindings)
  # Its checkpoints need not be there yet.
  config = configuration.build(pipeline.Pipeline, whole=False)
  title = ' '.join([*arguments.gin_file, *arguments.bindings])
  return show.stage_page(config, title, arguments.rows)


if __name__ == '__main__':
  sys.exit(main())
