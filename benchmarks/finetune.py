"""Fine-tunes a quickstart's model on 100 made pictures: before and after.

Half of the pictures show one thing that the model has never seen, the others
things that it knows; all are asked for in a new way and answered in a new
style. By LoRA and fully:

  python benchmarks/finetune.py runs/quickstart --folder SCRATCH

On other pictures: how often an answer has the new style, names the new thing,
names a known one, and the colour; and what remains of old skills on held-out
scenes. Finished steps are not repeated.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

import qwenvl_jax
from qwenvl_jax.data import sources
from qwenvl_jax.eval import scenes
from qwenvl_jax.quickstart import own_pictures

NEW_SKILLS = ('new style', 'new thing', 'known things', 'its background')
OLD_SKILLS = ('caption', 'exist', 'count', 'colour', 'refer')
# The settings of the release are for 9.6 billion parameters.
_ROW = 'Pipeline.sequence_length=96'
METHODS = {
  'LoRA': (
    'lora',
    ('RANK=16', 'ALPHA=32.0', 'OptimizerConfig.peak=1e-3', _ROW),
  ),
  'full': ('full', ('OptimizerConfig.peak=3e-4', _ROW)),
}


def run(module: str, *arguments: str) -> None:
  subprocess.run([sys.executable, '-m', module, *arguments], check=True)


def train(args: argparse.Namespace, base: pathlib.Path, name: str) -> float:
  """Fine-tunes; returns the seconds it took, 0 if it was done before."""
  config, settings = METHODS[name]
  out = args.folder / config
  if (out / 'finished').exists():
    return 0.0
  bindings = (
    f'BASE="{base}"',
    f'VOCABULARY="{base / "qwen.tiktoken"}"',
    f'DATA="{args.folder / "data"}"',
    f'EPOCHS={args.epochs}',
    *settings,
  )
  began = time.monotonic()
  run(
    'qwenvl_jax.train.main',
    f'--gin_file=finetune/{config}.gin',
    '--gin_file=finetune/quickstart.gin',
    f'--workdir={out}',
    *(f'--gin.{binding}' for binding in bindings),
  )
  (out / 'finished').touch()
  return time.monotonic() - began


def new_skills(qwen, count: int) -> dict[str, float]:
  """Shares of right answers on pictures that were not trained on."""
  rng = random.Random('held out')
  counts = dict.fromkeys(NEW_SKILLS, 0.0)
  for number in range(count):
    new = number % 2 == 0
    drawn = own_pictures.draw(rng, new)
    thing, colour = own_pictures.truth(drawn)
    answer, _ = qwen.chat(
      own_pictures.QUESTION, [drawn.picture], max_new_tokens=24
    )
    said = answer.split(' / ')
    counts['new style'] += (len(said) == 2) / count
    counts['new thing' if new else 'known things'] += (said[0] == thing) / (
      count / 2
    )
    counts['its background'] += (said[-1] == colour) / count
  return counts


def old_skills(qwen, test) -> dict[str, float]:
  """Shares of right answers by kind of question, both languages together."""
  asked, pictures = scenes.exam(
    test, qwen.config.vision.image_size, kinds=OLD_SKILLS, chat=True
  )
  seen, _ = scenes.ask(
    *(qwen.config, qwen.params, qwen.tokenizer, asked, pictures), chat=True
  )
  found = {kind: [] for kind in OLD_SKILLS}
  for answered in seen:
    found[answered.question.kind].append(answered.correct)
  return {kind: sum(right) / len(right) for kind, right in found.items()}


def size(folder: pathlib.Path) -> int:
  return sum(x.stat().st_size for x in folder.rglob('*') if x.is_file())


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('quickstart', type=pathlib.Path, help='its folder')
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--pictures', type=int, default=100)
  parser.add_argument('--epochs', type=float, default=20.0)
  parser.add_argument('--asked', type=int, default=40, help='of new skills')
  parser.add_argument('--scenes', type=int, default=20, help='of old skills')
  args = parser.parse_args()
  base = args.quickstart.absolute() / 'stage3'
  args.folder = args.folder.absolute()
  if not (args.folder / 'pictures').exists():
    own_pictures.write(args.folder / 'pictures', args.pictures)
  run(
    'qwenvl_jax.data.cli', 'prepare', 'mine', '--format', 'csv',
    '--manual_dir', str(args.folder / 'pictures'),
    '--data_dir', str(args.folder / 'data'),
  )  # fmt: skip
  test = list(
    sources.Scenes(
      str(args.quickstart / 'data'), 'test', limit=args.scenes
    ).open()
  )
  columns, sizes, seconds = {}, {'before': 0}, {'before': 0.0}
  for name in ('before', *METHODS):
    folder = base
    if name in METHODS:
      seconds[name] = train(args, base, name)
      folder = args.folder / METHODS[name][0]
      newest = max(
        (folder / 'checkpoints').iterdir(), key=lambda x: int(x.name)
      )
      sizes[name] = size(newest / 'params')
    qwen = qwenvl_jax.load(folder)
    columns[name] = new_skills(qwen, args.asked) | old_skills(qwen, test)
    print(name, json.dumps(columns[name]), flush=True)
  table = Table(title=f'{args.pictures} pictures, {args.epochs:g} epochs')
  table.add_column('right answers')
  for name in columns:
    table.add_column(name, justify='right')
  for row in columns['before']:
    table.add_row(row, *(f'{column[row]:.2f}' for column in columns.values()))
  table.add_row(
    'parameters saved, kB', *(f'{x / 1e3:,.0f}' for x in sizes.values())
  )
  table.add_row('training, s', *(f'{x:.0f}' for x in seconds.values()))
  Console().print(table)


if __name__ == '__main__':
  main()
