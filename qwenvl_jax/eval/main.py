"""`qwenvl-eval`: scores of a checkpoint or an endpoint on benchmarks."""

import argparse
import fnmatch
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Column, Table

from qwenvl_jax import api, buckets, checkpoint_options, entry
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.eval import compare, own, registry, results, tables
from qwenvl_jax.eval.answering import Model
from qwenvl_jax.eval.engine_model import EngineModel
from qwenvl_jax.eval.predictions import Shard
from qwenvl_jax.eval.run import Run
from qwenvl_jax.eval.task import Task
from qwenvl_jax.infer.engine import EngineConfig
from qwenvl_jax.progress import PrintableConsole, RateColumn, bars
from qwenvl_jax.sharding import use_all_devices

_KEY = 'OPENAI_API_KEY'

# Prompts that are read together.
_READ_ROWS = 8

_EXAMPLES = """
a first look, after bash launch/quickstart.sh:
  qwenvl-eval --checkpoint runs/quickstart/stage2 --tasks scenes_test \\
      --data_dir runs/quickstart/data --limit 200

more:
  qwenvl-eval --list
  qwenvl-eval --checkpoint Qwen-VL --tasks docvqa_val,'refcoco*' --data_dir data
  qwenvl-eval --base_url http://127.0.0.1:8000/v1 --tasks mme --data_dir data
  qwenvl-eval --checkpoint Qwen-VL --jsonl mine.jsonl --metric anls
  qwenvl-eval compare runs/eval/old runs/eval/new
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  again = 'interrupted; the same command goes on from here'
  return entry.run(_run, argv, interrupted=again)


def _parser() -> argparse.ArgumentParser:
  parser = entry.parser(
    'qwenvl-eval',
    """
    Score a model on benchmarks, as the paper did.

    Answers are kept as they come: a run that was stopped goes on. The folder
    of a run has results.html (scores beside the paper's), pictures.html and
    each prediction. `qwenvl-eval compare A B` tells two runs apart.
    """,
    _EXAMPLES,
    gin_help=False,
  )
  add = parser.add_argument
  add('--list', action='store_true', help='print all tasks and leave')
  add(
    '--checkpoint',
    metavar='DIR',
    help='a training run, a converted checkpoint, or a released folder',
  )
  add(
    '--base_url',
    metavar='URL',
    help='instead: an OpenAI endpoint, as http://127.0.0.1:8000/v1',
  )
  add(
    '--tasks',
    metavar='NAME,..',
    help='names of --list; * and ? stand for others',
  )
  add('--data_dir', metavar='DIR', default='data', help='files of the tasks')
  add('--jsonl', metavar='FILE', help=own.HELP)
  add('--metric', metavar='NAME', help=f'of --jsonl: {", ".join(own.METRICS)}')
  add(
    '--chat',
    action='store_true',
    help='of --jsonl: ask in chats, as Qwen-VL-Chat learned it',
  )
  add(
    '--max_tokens',
    type=int,
    default=100,
    metavar='N',
    help='of --jsonl: longest answer, in tokens (default: %(default)s)',
  )
  add(
    '--out',
    metavar='DIR',
    help='folder of the run, gs://.. for one in a bucket (default: runs/eval/ '
    'and the name of the model)',
  )
  add(
    '--limit',
    type=int,
    metavar='N',
    help='the first N examples of each task only',
  )
  add(
    '--shard',
    metavar='I/N',
    default='0/1',
    help='this process answers share I (from 0) of N; all write to one --out, '
    'and the last to finish scores',
  )
  add(
    '--pictures', type=int, metavar='N', default=50,
    help='examples of each task on the page (default: %(default)s)',
  )  # fmt: skip
  engine = parser.add_argument_group('with --checkpoint')
  add = engine.add_argument
  add(
    '--slots',
    type=int,
    default=32,
    metavar='N',
    help='answers at a time (default: %(default)s)',
  )
  add(
    '--max_len',
    type=int,
    metavar='N',
    help='tokens of a prompt and its answer (default: what training rows have)',
  )
  checkpoint_options.add_options(engine)
  add('--cache_dtype', choices=('int8',), help='of the key-value cache')
  endpoint = parser.add_argument_group('with --base_url')
  add = endpoint.add_argument
  add('--model', metavar='NAME', help='default: the first that is listed')
  add(
    '--api_key_file',
    metavar='FILE',
    help=f'holds the key of the API (default: the variable {_KEY})',
  )
  add(
    '--requests',
    type=int,
    default=32,
    metavar='N',
    help='at a time (default: %(default)s)',
  )
  add(
    '--as_chat',
    action='store_true',
    help='send raw prompts as chats: for other servers than qwenvl-serve',
  )
  return parser


def _run(argv: Sequence[str]) -> int:
  if argv and argv[0] == 'compare':
    return _compare(argv[1:])
  args, _ = entry.parse(_parser(), argv)
  console = PrintableConsole()
  if args.list:
    _print_list(console)
    return 0
  tasks, data_dir = _tasks(args)
  with use_all_devices():
    identity, open_model = _model(args)
    run = Run(
      out=_out(args),
      data_dir=data_dir,
      identity=identity,
      open_model=open_model,
      limit=_positive(args, 'limit'),
      shard=_shard(args.shard),
      pictures=_positive(args, 'pictures'),
    )
    run.prepare(tasks)
    waiting = {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with bars(Console(stderr=True), *columns, RateColumn()) as say:
      for task in tasks:
        outcome = run(task, functools.partial(say, task.name))
        if outcome.missing:
          waiting[task.name] = outcome.missing
  summaries = run.write_tables()
  _print_scores(console, summaries)
  for name, count in waiting.items():
    print(f'{name}: {count} examples are left to other processes (--shard)')
  if summaries:
    print(f'results:  {run.out / "results.html"}')
    print(f'pictures: {run.out / "pictures.html"}')
  _check_answered(summaries, [task.name for task in tasks], run.out)
  return 0


def _check_answered(
  summaries: Sequence[Mapping[str, Any]], asked: Sequence[str], out: Path
) -> None:
  """DataError if no example of a task that was asked for has an answer."""
  for summary in summaries:
    name, counts = summary['task'], summary['counts']
    if name in asked and counts['problems'] and not counts['answered']:
      first = next(iter(summary['problems'].values()))
      raise DataError(
        f'{name}: none of {counts["examples"]} examples has an answer; the '
        f'first: {first}; more are in {out / name / "results.json"}'
      )


def _tasks(args: argparse.Namespace) -> tuple[list[Task], Path]:
  """The tasks of a command line, and where their files are."""
  if bool(args.tasks) == bool(args.jsonl):
    raise ConfigError(
      'either --tasks=NAME,.. or --jsonl=FILE says what to ask; --list shows '
      'all tasks'
    )
  if args.jsonl:
    file = Path(args.jsonl).expanduser()
    most = _positive(args, 'max_tokens')
    task = own.make_task(file, args.metric, args.chat, most)
    return [task], file.parent
  names = {}
  for pattern in args.tasks.split(','):
    found = fnmatch.filter(registry.all_tasks(), pattern.strip())
    names |= dict.fromkeys(found or [pattern.strip()])
  data_dir = buckets.as_path(args.data_dir)
  if buckets.in_bucket(data_dir):
    raise ConfigError(
      f'--data_dir={args.data_dir} is in a bucket, and pictures are read from '
      'folders: mount it (gcsfuse), or launch/tpu_pod.sh eval --mount-data'
    )
  return [registry.get(name) for name in names], data_dir


def _model(
  args: argparse.Namespace,
) -> tuple[Mapping[str, Any], Callable[[], Model]]:
  """Identity of the model of a command line, and what opens it."""
  if bool(args.checkpoint) == bool(args.base_url):
    raise ConfigError(
      'either --checkpoint=DIR or --base_url=URL says what answers'
    )
  if args.base_url:
    endpoint = _endpoint(args)
    return endpoint.identity(), lambda: endpoint
  # Of all settings, those that change what is said.
  names = (*checkpoint_options.NAMES, 'cache_dtype')
  settings = {name: getattr(args, name) for name in names}
  identity = {
    'checkpoint': Path(args.checkpoint).name,
    'digest': api.digest(args.checkpoint),
    **settings,
  }
  return identity, lambda: _engine(args, identity)


def _engine(args: argparse.Namespace, identity: Mapping[str, Any]) -> Model:
  handle = checkpoint_options.load(args)
  engine = handle.engine(
    EngineConfig(
      slots=args.slots,
      max_len=args.max_len or handle.config.decoder.seq_length,
      read_rows=min(args.slots, _READ_ROWS),
      cache_dtype=args.cache_dtype,
    )
  )
  return EngineModel(engine, handle.tokenizer, dict(identity))


def _endpoint(args: argparse.Namespace) -> Model:
  try:
    from qwenvl_jax.eval.endpoint import Endpoint
  except ImportError as error:
    raise ConfigError(
      f'{error.name} is not installed; pip install "qwenvl_jax[eval]"'
    ) from error
  key = os.environ.get(_KEY)
  if args.api_key_file:
    try:
      key = Path(args.api_key_file).read_text('utf-8').strip()
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(
        f'--api_key_file={args.api_key_file} cannot be read ({error}); it '
        'holds one key'
      ) from error
  return Endpoint(
    args.base_url,
    key=key,
    model=args.model,
    requests=_positive(args, 'requests'),
    as_chat=args.as_chat,
  )


def _compare(argv: Sequence[str]) -> int:
  parser = entry.parser(
    'qwenvl-eval compare',
    """
    Compare two runs: paired differences with their intervals, and which
    answers flipped, with pictures.
    """,
    """
    qwenvl-eval compare runs/eval/quickstart-stage2 runs/eval/mine-stage2
    """,
    gin_help=False,
  )
  add = parser.add_argument
  folder = buckets.as_path
  add('first', type=folder, metavar='A', help='folder of a run')
  add('second', type=folder, metavar='B', help='folder of another')
  add(
    '--data_dir',
    metavar='DIR',
    type=Path,
    help='files of the tasks: the page then shows pictures',
  )
  add('--out', metavar='FILE', type=Path, help='default: B/compare.html')
  add(
    '--pictures', type=int, metavar='N', default=50,
    help='flipped answers of each task on the page (default: %(default)s)',
  )  # fmt: skip
  args, _ = entry.parse(parser, argv)
  pictures = _positive(args, 'pictures')
  tasks = [
    _scored_task(args.second, name)
    for name in compare.common_tasks(args.first, args.second)
  ]
  found = [compare.compare(task, args.first, args.second) for task in tasks]
  shown = Table(*compare.HEAD)
  for row in compare.rows(found):
    shown.add_row(*row)
  PrintableConsole().print(shown)
  out = args.out or args.second / 'compare.html'
  buckets.write(out, compare.page(found, args.data_dir, pictures))
  print(f'what flipped: {out}')
  return 0


def _scored_task(folder: Path, name: str) -> Task:
  """The task of a run's folder; of own questions, their metric."""
  if name in registry.all_tasks():
    return registry.get(name)
  summary = results.load_summary(folder / name)
  return Task(
    *(name, summary['title'], summary['metric']), scale=summary['scale']
  )


def _out(args: argparse.Namespace) -> Path:
  if args.out is not None:
    return buckets.as_path(args.out)
  if args.checkpoint:
    # Of a run's stage, both names: runs/quickstart/stage2 -> quickstart-stage2.
    parts = Path(args.checkpoint).absolute().parts[-2:]
    return Path('runs/eval', '-'.join(parts))
  return Path('runs/eval', args.model or 'endpoint')


def _shard(text: str) -> Shard:
  first, _, second = text.partition('/')
  if not (first.isdecimal() and second.isdecimal()):
    raise ConfigError(f'--shard={text} is not I/N, as 0/4')
  return Shard(int(first), int(second))


def _positive(args: argparse.Namespace, name: str) -> int | None:
  value = getattr(args, name)
  if value is not None and value < 1:
    raise ConfigError(f'--{name}={value}: must be at least 1')
  return value


def _print_list(console: Console) -> None:
  # A name that is cut cannot be copied to --tasks.
  name = Column('task', no_wrap=True)
  shown = Table(name, 'benchmark', 'metric', 'files in --data_dir', box=None)
  for task in registry.all_tasks().values():
    files = ', '.join(file.path for file in task.files)
    shown.add_row(task.name, task.title, task.metric, files)
  console.print(shown)


def _print_scores(
  console: Console, summaries: Sequence[Mapping[str, Any]]
) -> None:
  head, rows = tables.rows(summaries)
  shown = Table(*head)
  for row in rows:
    shown.add_row(*row)
  console.print(shown)


if __name__ == '__main__':
  sys.exit(main())
