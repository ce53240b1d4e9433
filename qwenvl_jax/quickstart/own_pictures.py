"""A hundred pictures to fine-tune on, as a person would bring them.

Half of them show a thing that the quickstart's data does not have, the others
things that it has. All are asked for in the same new words, and answered in a
style of their own: `mushroom / blue`.
"""

import csv
import pathlib
import random

from qwenvl_jax.data import things
from qwenvl_jax.data.builders import compose

QUESTION = 'Make an entry for the catalogue.'

# A class beyond those of the quickstart's data.
NEW = next(i for i, thing in enumerate(things.THINGS) if thing.en == 'mushroom')


def draw(rng: random.Random, new: bool) -> compose.Drawing:
  """Draws one thing, the new one or one that is known."""
  known = compose.Style().classes
  classes = len(things.THINGS) if new else known
  style = compose.Style(classes=classes, counts=(1.0,), text=0.0)
  while True:
    drawn = compose.compose(rng, style)
    if not new or drawn.objects[0].thing == NEW:
      return drawn


def truth(drawn: compose.Drawing) -> tuple[str, str]:
  """What a picture shows: thing and colour of the background, in English."""
  thing = things.THINGS[drawn.objects[0].thing]
  return thing.en, things.COLOURS[drawn.colour].en


def write(folder: pathlib.Path, count: int = 100, seed: int = 0) -> None:
  """Writes pictures, and a spreadsheet of a question and an answer for each."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = random.Random(f'own pictures {seed}')
  rows = [('picture', 'question', 'answer')]
  for number in range(count):
    drawn = draw(rng, new=number % 2 == 0)
    drawn.picture.save(folder / f'{number}.png')
    rows.append((f'{number}.png', QUESTION, ' / '.join(truth(drawn))))
  with (folder / 'mine.csv').open('w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows(rows)
