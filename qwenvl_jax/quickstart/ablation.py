"""The paper's ablations (Appendix E) in small, each by one command.

Each variant is a run of `qwenvl-train` with files of `configs/ablation/` beside
that of a stage, or an evaluation of a checkpoint: at full size the same files
do the same (docs/evaluation.md).
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from qwenvl_jax import buckets, entry
from qwenvl_jax.data import sources
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.eval import compare, curves
from qwenvl_jax.progress import print_table
from qwenvl_jax.quickstart import __main__ as quickstart
from qwenvl_jax.quickstart import evaluate, text_exams
from qwenvl_jax.quickstart.phases import Phases

# Tokens of a row beside the image's.
_TEXT = 48

# Of a run's steps, the share that "first" and "last" are means of.
_SHARE = 0.2

_SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Variant:
  """One run of an ablation.

  Attributes:
    name: in the table; the run's folder is it, with `_` for spaces.
    files: of `configs/ablation/`.
    beside: the variant that it is compared with.
    paper: the paper's own figure.
    queries: image features.
  """

  name: str
  files: tuple[str, ...]
  beside: str
  paper: str = ''
  queries: int = 256


@dataclasses.dataclass(frozen=True)
class Training:
  """Variants that are trained and compared by their loss.

  Attributes:
    title: over table and picture.
    variants: in the table's order.
    paper: what the paper found, in a sentence.
    paper_column: what `Variant.paper` is.
    steps: by default.
    batch: pairs a step, in rows of two captions.
  """

  title: str
  variants: tuple[Variant, ...]
  paper: str
  paper_column: str
  steps: int
  batch: int


TRAININGS = {
  'queries': Training(
    'Queries of the adapter (E.2), 224 pixels',
    tuple(
      Variant(f'{n} queries', (f'queries_{n}',), '256 queries', '', n)
      for n in (64, 144, 256, 400)
    ),
    'The paper (figure 7) shows curves and no figures: with fewer queries the '
    'loss is lower in the first steps (50), but between steps 1,000 and 5,000 '
    'too few and too many converge more slowly; it takes 256.',
    '',
    steps=100,
    batch=8,
  ),
  'window': Training(
    'Window and global attention of the vision transformer (E.3)',
    tuple(
      Variant(
        f'{side} {kind}',
        (f'resolution_{side}', *(('window',) if kind == 'window' else ())),
        f'{side} global',
        seconds,
      )
      for side, kind, seconds in (
        (448, 'global', '10'),
        (448, 'window', '9'),
        (896, 'global', '60'),
        (896, 'window', '25'),
      )
    ),
    'The paper (figure 8, table 10): the loss with windows is clearly higher, '
    'and at 448 pixels they save little time; at 896, 2.4 times. It takes '
    'global attention at 448.',
    'paper: s/step',
    steps=40,
    batch=2,
  ),
}

# Of `text`: the checkpoints, and what the paper's models at these points have.
_STAGES = ('decoder', 'stage1', 'stage2')
_PAPER_TEXT = (
  'The paper (table 11), 5 shots: MMLU 49.9 before and 50.7 after, C-Eval 48.5 '
  'and 51.1, CMMLU 49.5 after (Qwen-7B as it was when Qwen-VL started from it, '
  'and Qwen-VL): nothing is lost.'
)

_EXAMPLES = """
python -m qwenvl_jax.quickstart.ablation queries
python -m qwenvl_jax.quickstart.ablation window --steps 10
python -m qwenvl_jax.quickstart.ablation text --quickstart runs/quickstart
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit status."""
  again = 'interrupted; the same command goes on from here'
  return entry.run(_run, argv, interrupted=again)


def _parser() -> argparse.ArgumentParser:
  parser = entry.parser(
    'python -m qwenvl_jax.quickstart.ablation',
    """
    Repeat an ablation of the paper (Appendix E) in small: train or evaluate
    each variant, and write a table and the loss curves.

      queries  64, 144, 256 and 400 queries of the adapter (E.2)
      window   window and global vision attention at 448 and 896 pixels (E.3)
      text     text-only scores before and after stage 2 (E.4)

    Starts from a quickstart's folder; what is missing of it is made first.
    Finished variants are not repeated.
    """,
    _EXAMPLES,
    gin_help=False,
  )
  add = parser.add_argument
  add('ablation', choices=(*TRAININGS, 'text'), help='which one')
  add(
    '--out',
    type=Path,
    default=Path('runs/ablation'),
    help='folder for runs, tables and pictures (default: %(default)s)',
  )
  add(
    '--quickstart',
    type=Path,
    default=Path('runs/quickstart'),
    metavar='DIR',
    help='folder of launch/quickstart.sh: data, and what training starts from '
    '(default: %(default)s)',
  )
  steps = ', '.join(f'{x.steps} for {name}' for name, x in TRAININGS.items())
  add(
    '--steps',
    type=int,
    metavar='N',
    help=f'of each variant (default: {steps})',
  )
  add(
    '--questions',
    type=int,
    default=100,
    metavar='N',
    help='text: of each of three subjects, in either language '
    '(default: %(default)s)',
  )
  add(
    '--smoke',
    action='store_true',
    help='the quickstart is made by --smoke: it has learned nothing',
  )
  return parser


def _run(argv: Sequence[str]) -> int:
  args, _ = entry.parse(_parser(), argv)
  for name in ('steps', 'questions'):
    value = getattr(args, name)
    if value is not None and value < 2:
      raise ConfigError(f'--{name}={value}: must be at least 2')
  settings = quickstart.Settings(
    args.quickstart.resolve(), args.smoke, platform='cpu'
  )
  quickstart.use_platform(settings.platform)
  out = args.out.resolve()
  if args.ablation == 'text':
    stages = 'decoder', 'vision', 'stage1', 'stage2'
    phases = Phases(('data', *stages), estimated=not args.smoke)
    quickstart.make(settings, stages, phases)
    _text(settings, out, args.questions)
    return 0
  training = TRAININGS[args.ablation]
  steps = args.steps or training.steps
  names = (variant.name for variant in training.variants)
  phases = Phases(('data', 'decoder', *names), estimated=False)
  quickstart.make(settings, ('decoder',), phases)
  for variant in training.variants:
    _train(settings, training, variant, out, steps, phases)
  runs = {x.name: _folder(out, x) for x in training.variants}
  head, rows = table(training, runs)
  note = f'{steps} steps of {training.batch} pictures. {training.paper}'
  _write(out / f'{args.ablation}.md', training.title, head, rows, note)
  figure = _draw(training.title, runs)
  with buckets.atomic_write(out / f'{args.ablation}.png') as path:
    figure.savefig(path, format='png', dpi=120)
  print(f'curves: {out / args.ablation}.png')
  return 0


def _folder(out: Path, variant: Variant) -> Path:
  return out / variant.name.replace(' ', '_')


def _train(
  settings: quickstart.Settings,
  training: Training,
  variant: Variant,
  out: Path,
  steps: int,
  phases: Phases,
) -> None:
  """Runs a variant, if it is not there yet.

  Raises:
    ConfigError: a run of other steps is there, or this one failed.
  """
  folder = _folder(out, variant)
  if quickstart.finished(folder):
    print(f'{variant.name}: finished before, in {folder}')
    _check_steps(folder, steps)
    return
  names = ('quickstart/stage1', 'ablation/small')
  names += tuple(f'ablation/{name}' for name in variant.files)
  options = [f'--gin_file={name}.gin' for name in names]
  options += [
    f'--workdir={folder}',
    f'--gin.DATA={quickstart.quoted(settings.out / "data")}',
    f'--gin.DECODER={quickstart.quoted(settings.out / "decoder")}',
    f'--gin.OptimizerConfig.steps={steps}',
    f'--gin.OptimizerConfig.warmup={max(steps // 10, 1)}',
    f'--gin.pipeline.Pipeline.batch_size={training.batch}',
    f'--gin.pipeline.Pipeline.sequence_length={variant.queries + _TEXT}',
  ]
  if settings.smoke:
    options.append('--gin.Scenes.config="small"')
  environment = quickstart.training_environment()
  phases.begin(variant.name)
  quickstart.command('qwenvl_jax.train.main', *options, **environment)
  # Of a run that was stopped, more steps may be there than are asked for now.
  _check_steps(folder, steps)
  quickstart.mark_finished(folder, phases.end(variant.name))


def _check_steps(folder: Path, steps: int) -> None:
  there = len(_losses(folder))
  if there != steps:
    raise ConfigError(
      f'{folder} has a run of {there} steps, not of {steps}: name another '
      f'--out, or --steps {there}'
    )


def _losses(folder: Path) -> np.ndarray:
  return np.array([loss for _, loss in curves.losses(folder)['loss']])


def _seconds(folder: Path) -> float:
  """The median time of a step; the first ones compile."""
  lines = (folder / 'log.jsonl').read_text('utf-8').splitlines()
  times = [json.loads(line)['seconds'] for line in lines]
  return statistics.median(times[len(times) // 5 :])


def table(
  training: Training, runs: Mapping[str, Path]
) -> tuple[list[str], list[list[str]]]:
  """Makes a table of the variants' losses and times.

  Losses are means of the first and last fifth of the steps. All variants see
  the same captions in the same order, so that differences are paired: step by
  step, with their standard error.

  Returns:
    Head and rows.
  """
  losses = {name: _losses(folder) for name, folder in runs.items()}
  seconds = {name: _seconds(folder) for name, folder in runs.items()}
  head = ['', 'loss, first fifth', 'loss, last fifth', 'difference', 's/step']
  head += [training.paper_column] * bool(training.paper_column)
  rows = []
  for variant in training.variants:
    found = losses[variant.name]
    share = max(int(len(found) * _SHARE), 1)
    difference = (found - losses[variant.beside])[-share:]
    error = difference.std() / max(share - 1, 1) ** 0.5
    compared = f'{difference.mean():+.3f} ± {error:.3f}'
    rows.append([
      variant.name,
      f'{found[:share].mean():.3f}',
      f'{found[-share:].mean():.3f}',
      '' if variant.name == variant.beside else compared,
      f'{seconds[variant.name]:.2f}',
    ])  # fmt: skip
    rows[-1] += [variant.paper] * bool(training.paper_column)
  return head, rows


def _draw(title: str, runs: Mapping[str, Path]) -> Figure:
  """The runs' losses over each other, smoothed over a tenth of the steps."""
  figure = Figure(figsize=(7, 4))
  axis = figure.subplots()
  for name, folder in runs.items():
    found = _losses(folder)
    width = max(len(found) // 10, 1)
    smooth = np.convolve(found, np.ones(width) / width, 'valid')
    axis.plot(np.arange(width, len(found) + 1), smooth, label=name)
  axis.set(title=title, xlabel='step', ylabel='loss')
  axis.grid(alpha=0.3)
  axis.legend()
  figure.tight_layout()
  return figure


def _text(settings: quickstart.Settings, out: Path, count: int) -> None:
  config = 'small' if settings.smoke else 'default'
  held_out = sources.Scenes(
    str(settings.out / 'data'), 'test', config, limit=count
  )
  exams = out / 'exams'
  text_exams.write(exams, list(held_out.open()))
  found = text_exams.tasks()
  runs = {}
  for stage in _STAGES:
    runs[stage] = _evaluate(settings.out / stage, exams, out / 'text' / stage)
  pairs = [
    compare.compare(task, runs['stage1'], runs['stage2']) for task in found
  ]
  starts = [
    compare.compare(task, runs['decoder'], runs['stage1']) for task in found
  ]
  head = ['', 'n', 'decoder', 'before', 'after', 'difference', '95% interval']
  rows = []
  for start, pair in zip(starts, pairs, strict=True):
    shares = (start.scores[0], *pair.scores)
    rows.append([
      pair.task.title,
      str(pair.count),
      *(f'{100 * share:.1f}' for share in shares),
      f'{100 * pair.difference:+.1f}',
      ' to '.join(f'{100 * bound:+.1f}' for bound in pair.bounds),
    ])  # fmt: skip
  note = (
    'Percent right: of the decoder before it met pictures, before stage 2 and '
    f'after it; guessing has 25. {_PAPER_TEXT}'
  )
  _write(out / 'text.md', 'Text-only scores (E.4)', head, rows, note)


def _evaluate(checkpoint: Path, exams: Path, out: Path) -> Path:
  """Scores a stage; what is there of an earlier call is not asked again."""
  run = evaluate.open_run(checkpoint, exams, out, slots=_SLOTS)
  found = text_exams.tasks()
  run.prepare(found)
  for task in found:
    run(task)
  run.write_tables()
  return out


def _write(
  path: Path,
  title: str,
  head: Sequence[str],
  rows: Sequence[Sequence[str]],
  note: str,
) -> None:
  """Prints a table and writes it as Markdown."""
  print_table(head, rows, title=title)
  print(note)
  lines = [f'# {title}', '']
  for cells in (head, ['---'] * len(head), *rows):
    lines.append(f'| {" | ".join(cells)} |')
  buckets.write(path, '\n'.join([*lines, '', note, '']))
  print(f'table:  {path}')


if __name__ == '__main__':
  sys.exit(main())
