"""A hundred pictures to fine-tune on, as a person would bring them.

Half of them show a thing that the quickstart's data does not have, the others
things that it has. All are asked for in the same new words, and answered in a
style of their own: `blue / mushroom`. And conversations of the kind that the
model was trained on before, to mix in:

  python -m qwenvl_jax.quickstart.own_pictures mine --known known
"""

import argparse
import csv
import json
import os
import pathlib
import random
import sys
from collections.abc import Sequence

from qwenvl_jax import entry, image
from qwenvl_jax.data import questions, sources, things
from qwenvl_jax.data.builders import compose
from qwenvl_jax.data.records import Scene

QUESTION = 'Make an entry for the catalogue.'

# A class beyond those of the quickstart's data.
NEW = next(i for i, thing in enumerate(things.THINGS) if thing.en == 'mushroom')

# How often kinds of questions are asked in the conversations to mix in: those
# that need the most practice most often.
_KNOWN = {
  'refer': 5,
  'caption': 4,
  'exist': 2,
  'count': 2,
  'name_box': 1,
  'side': 1,
  'left_of': 1,
  'colour': 1,
  'grounded_caption': 1,
  'ocr': 1,
}
_TURNS = 3


def draw(rng: random.Random, new: bool) -> Scene:
  """Draws one thing, the new one or one that is known."""
  known = compose.Style().classes
  classes = len(things.THINGS) if new else known
  style = compose.Style(classes=classes, counts=(1.0,), text=0.0)
  while True:
    drawn = compose.compose(rng, style)
    if not new or drawn.objects[0].thing == NEW:
      return drawn


def truth(drawn: Scene) -> tuple[str, str]:
  """What a picture shows: colour of the background and thing, in English."""
  thing = things.THINGS[drawn.objects[0].thing]
  return things.COLOURS[drawn.colour].en, thing.en


def write(folder: pathlib.Path, count: int = 100, seed: int = 0) -> None:
  """Writes pictures, and a spreadsheet of a question and an answer for each."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random(f'own pictures {seed}')
  rows = [('picture', 'question', 'answer')]
  for number in range(count):
    drawn = draw(rng, new=number % 2 == 0)
    drawn.image.save(folder / f'{number}.jpg', quality=95)
    rows.append((f'{number}.jpg', QUESTION, ' / '.join(truth(drawn))))
  with (folder / 'mine.csv').open('w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows(rows)


def write_known(
  folder: pathlib.Path,
  data_dir: str | os.PathLike,
  count: int = 500,
  seed: int = 0,
  config: str = 'default',
) -> None:
  """Writes pictures that were trained on, and a conversation about each.

  In LLaVA's form, of three questions at most.

  Raises:
    DataError: the scenes are not there.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random(f'known pictures {seed}')
  entries = []
  scenes = sources.Scenes(data_dir, config=config, limit=count).open()
  for number, scene in enumerate(scenes):
    asked = questions.sample(
      *(scene, rng, _KNOWN, _TURNS),
      classes=compose.Style().classes,
      chat=True,
    )
    image.load(scene.image, scene.id).save(folder / f'{number}.png')
    turns = []
    for turn, question in enumerate(asked):
      value = question.prompt if turn else f'<image>\n{question.prompt}'
      turns.append({'from': 'human', 'value': value})
      turns.append({'from': 'gpt', 'value': question.answer})
    entries.append({'image': f'{number}.png', 'conversations': turns})
  text = json.dumps(entries, ensure_ascii=False, indent=1)
  (folder / 'known.json').write_text(text + '\n', encoding='utf-8')


def _run(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog='python -m qwenvl_jax.quickstart.own_pictures',
    description='Writes pictures to fine-tune the quickstart on, with a '
    'spreadsheet of a question and an answer for each.',
  )
  parser.add_argument('folder', type=pathlib.Path, help='to write')
  parser.add_argument(
    '--count', type=int, default=100, help='pictures (default: %(default)s)'
  )
  parser.add_argument(
    '--known',
    metavar='DIR',
    type=pathlib.Path,
    help='also write conversations about pictures that the quickstart was '
    'trained on, to mix in',
  )
  parser.add_argument(
    '--data_dir',
    metavar='DIR',
    default='runs/quickstart/data',
    help='the data of the quickstart, for --known (default: %(default)s)',
  )
  args = parser.parse_args(argv)
  write(args.folder, args.count)
  print(f'{args.count} pictures and mine.csv: {args.folder}')
  if args.known:
    write_known(args.known, args.data_dir)
    print(f'pictures and known.json: {args.known}')


if __name__ == '__main__':
  sys.exit(entry.run(_run))
