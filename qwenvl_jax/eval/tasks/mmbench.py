"""MMBench (Liu et al., 2023), with circular evaluation."""

import collections
import csv
import dataclasses
import functools
import pathlib
import random
from collections.abc import Iterable, Sequence

from qwenvl_jax import buckets
from qwenvl_jax.errors import DataError
from qwenvl_jax.eval.annotations.rows import embedded, rows
from qwenvl_jax.eval.choices import (
  CONTEXT,
  LETTERS,
  LIKELIEST,
  Choices,
  lettered,
  letters,
)
from qwenvl_jax.eval.task import Example, File, Item, Picture, Prompt, Scores

_CYCLE = 1_000_000  # between the numbers of a question's rotations


@dataclasses.dataclass(frozen=True)
class MmBench(Choices):
  """MMBench: a question stands in up to four rows, its options rotated.

  Attributes:
    file: the table with the pictures.
  """

  file: str = 'mmbench_dev_20230712.tsv'

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    pictures = {}
    columns = ('index', 'question', 'hint', 'A', 'B', 'image', 'answer')
    if 'test' in self.file:
      columns = columns[:-1]
    file = data_dir / 'mmbench' / self.file
    for record, row in rows(file, columns, delimiter='\t'):
      index = _index(row['index'], record)
      options = [row.get(letter, '') for letter in 'ABCD']
      while options and not options[-1]:
        options.pop()
      if len(options) < 2 or not all(options):
        raise DataError(f'{record}: no options, or one of them is empty')
      answer = row.get('answer', '')
      if answer and answer not in tuple(LETTERS[: len(options)]):
        raise DataError(f'{record}: {answer!r} is none of the options')
      question = str(index % _CYCLE)
      text = CONTEXT.format(
        row['hint'] or 'N/A', row['question'], lettered(options)
      )
      yield Example(
        str(index),
        Prompt((_embedded(row['image'], pictures, index, record), text)),
        target=answer or None,
        choices=letters(len(options)),
        group=question,
        category=row.get('category') or None,
        meta={'options': options},
      )

  def score(self, answer: str, example: Example) -> Scores:
    if example.target is None:
      return {}
    return super().score(answer, example)

  def combine(self, items: Sequence[Item]) -> Scores:
    """All rotations right, and the release's vote.

    The vote is over what the options say; among equals one is drawn, as in
    the release, by the question's number.
    """
    if any(item.example.target is None for item in items):
      return {}
    right = [item.scores['accuracy'] for item in items]
    true = _said(items[0].example.target, items[0])
    return {
      'accuracy': float(all(right)),
      'accuracy_vote': float(_vote(items) == true),
      'accuracy_single': right[0],
    }

  def finish(self, items: Sequence[Item], folder: pathlib.Path) -> list[str]:
    """Writes tables for OpenCompass's server, a row a rotation.

    One has the answers as they are; `_vote` gives all rotations of a question
    the answer of their vote, as the release submits them.
    """
    groups = collections.defaultdict(list)
    for item in items:
      groups[item.example.group].append(item)
    winners = {group: _vote(found) for group, found in groups.items()}
    own, voted = [], []
    for item in items:
      options = item.example.meta['options']
      cells = [item.example.key, *options, *[''] * (4 - len(options))]
      winner = winners[item.example.group]
      own.append([*cells, item.answer])
      index = options.index(winner) if winner in options else None
      voted.append([*cells, '' if index is None else LETTERS[index]])
    names = [f'{self.name}_submission{x}.tsv' for x in ('', '_vote')]
    for name, table in zip(names, (own, voted), strict=True):
      _write(folder / name, table)
    return names


def _write(path: pathlib.Path, table: Sequence[Sequence[str]]) -> None:
  with (
    buckets.atomic_write(path) as local,
    open(local, 'w', encoding='utf-8', newline='') as file,
  ):
    writer = csv.writer(file, delimiter='\t', lineterminator='\n')
    writer.writerow(['index', *'ABCD', 'prediction'])
    writer.writerows(table)


def _said(letter: str, item: Item) -> str:
  """What an option says."""
  options = item.example.meta['options']
  index = LETTERS.find(letter) if letter else -1
  return options[index] if 0 <= index < len(options) else ''


def _vote(items: Sequence[Item]) -> str:
  counts = collections.Counter(_said(item.answer, item) for item in items)
  most = max(counts.values())
  likely = [option for option, count in counts.items() if count == most]
  return random.Random(items[0].example.group).choice(likely)


def _index(text: str, record: str) -> int:
  try:
    return int(float(text))
  except (ValueError, OverflowError):
    raise DataError(f'{record}: {text!r:.40} is no index') from None


def _embedded(text: str, pictures: dict, index: int, record: str) -> Picture:
  """A picture in base64, or the index of a row that has it."""
  if len(text) < 32 and text.isdigit():
    if int(text) not in pictures:
      raise DataError(f'{record}: its picture is that of {text}, not found yet')
    return pictures[int(text)]
  known = pictures.get(index % _CYCLE)
  if known is None or known.source.args[0] != text:
    source = functools.partial(embedded, text, record)
    known = Picture(source, f'{record}, picture')
  pictures.setdefault(index, known)
  return known


def _mmbench(name: str, title: str, split: str, count: int) -> MmBench:
  file = f'mmbench_{split}_20230712.tsv'
  return MmBench(
    name,
    title,
    files=(
      File(
        f'mmbench/{file}',
        f'{file} of https://github.com/open-compass/MMBench',
      ),
    ),
    template=f'<img>{{}}</img>{CONTEXT}',
    postprocessing=f'{LIKELIEST}; right if it is in all rotations '
    '(CircularEval). _vote: the option most often named, as in the release; '
    '_single: the first row alone',
    count=count,
    file=file,
  )


TASKS = (
  _mmbench('mmbench_dev', 'MMBench dev', 'dev', 4329),
  _mmbench('mmbench_test', 'MMBench test', 'test', 6666),
)
