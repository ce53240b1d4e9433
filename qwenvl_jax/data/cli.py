"""`qwenvl-data`: what data there is, preparing it, looking at it."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import rich.console
import rich.progress
import rich.table

from qwenvl_jax.data import prepare, show, sources
from qwenvl_jax.data.cleaning import cli as cleaning_cli
from qwenvl_jax.errors import DataError, QwenVLError

_EPILOG = """\
examples:
  qwenvl-data list
  qwenvl-data prepare scenes --data_dir data
  qwenvl-data show scenes --data_dir data --output rows.html
"""


# Commands with a command line of their own.
_JOBS = {
  'clean': (cleaning_cli.command, 'clean picture-text pairs (Appendix A)'),
}


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line; exits with status 2 on bad input."""
  argv = sys.argv[1:] if argv is None else list(argv)
  console = rich.console.Console()
  try:
    if argv and argv[0] in _JOBS:
      _JOBS[argv[0]][0](argv[1:], console)
      return
    arguments = _parser().parse_args(argv)
    arguments.run(arguments, console)
  except QwenVLError as error:
    print(f'qwenvl-data: {error}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    sys.exit(130)


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
  command.set_defaults(run=_list)

  command = commands.add_parser(
    'prepare', parents=[shared], help='write a data set to the data folder'
  )
  command.add_argument('name', choices=['scenes', 'easy_vqa'])
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
  command.add_argument('name', choices=['scenes', 'easy_vqa'])
  command.add_argument('--config', default='default')
  command.add_argument('--split', default='train')
  command.add_argument(
    '--tasks',
    default='questions',
    choices=['questions', 'chats', 'words'],
    help='stages 1 and 2, stage 3, or pictures written as words',
  )
  command.add_argument('--rows', type=int, default=12)
  command.add_argument('--seed', type=int, default=0)
  command.add_argument(
    '--output', type=pathlib.Path, default=pathlib.Path('rows.html')
  )
  command.set_defaults(run=_show)
  for name, (_, what) in _JOBS.items():
    commands.add_parser(name, help=what, add_help=False)
  return parser


def _list(arguments, console):
  table = rich.table.Table(title=str(sources.data_path(arguments.data_dir)))
  for column in ('name', 'split', 'records', 'what'):
    table.add_column(column, justify='right' if column == 'records' else 'left')
  what = 'composed scenes, boxes and names, English and Chinese'
  configs = sources.prepared_configs(arguments.data_dir)
  if not configs:
    table.add_row('scenes', '', 'not prepared', what)
  for config in configs:
    folder = sources.scenes_folder(arguments.data_dir, config)
    for split, count in sources.split_sizes(folder).items():
      name = 'scenes' if config == 'default' else f'scenes ({config})'
      table.add_row(name, split, f'{count:,}', what)
      what = ''
  what = 'easy-VQA 1.0: questions about shapes (package, MIT)'
  for split in ('train', 'test'):
    records = sources.EasyVqa(split).open()
    table.add_row('easy_vqa', split, f'{len(records):,}', what)
    what = ''
  console.print(table)


def _prepare(arguments, console):
  if arguments.name == 'easy_vqa':
    count = sum(len(sources.EasyVqa(x).open()) for x in ('train', 'test'))
    console.print(
      f'easy_vqa needs no preparation: its {count:,} pictures are read from '
      'the installed package.'
    )
    return
  with rich.progress.Progress(
    *rich.progress.Progress.get_default_columns(),
    rich.progress.MofNCompleteColumn(),
    console=console,
  ) as bars:
    tasks = {}

    def progress(what, done, total):
      if what not in tasks:
        tasks[what] = bars.add_task(what, total=total)
      bars.update(tasks[what], completed=done)

    folder = prepare.scenes(
      arguments.data_dir, arguments.config, arguments.vocabulary, progress
    )
  table = rich.table.Table(title=str(folder))
  table.add_column('split')
  table.add_column('scenes', justify='right')
  for split, count in sources.split_sizes(folder).items():
    table.add_row(split, f'{count:,}')
  console.print(table)
  console.print(f'vocabulary: {sources.small_vocabulary(arguments.data_dir)}')


def _show(arguments, console):
  page = show.page(
    name=arguments.name,
    data_dir=arguments.data_dir,
    config=arguments.config,
    split=arguments.split,
    kind=arguments.tasks,
    rows=arguments.rows,
    seed=arguments.seed,
  )
  try:
    arguments.output.write_text(page, encoding='utf-8')
  except OSError as error:
    raise DataError(
      f'cannot write {arguments.output} ({error.strerror}); name another file '
      'with --output'
    ) from error
  console.print(f'{arguments.output}: open it in a browser')


if __name__ == '__main__':
  main()
