"""Sources that are lists, for tests of what comes after them."""

import dataclasses
import random

import downloads

from qwenvl_jax.data.records import Qa, Record, Region
from qwenvl_jax.errors import BadRecordError

_PICTURES = tuple(downloads.picture(seed=n) for n in range(4))


@dataclasses.dataclass(frozen=True)
class Listed:
  """A source of records that are at hand; errors among them are raised."""

  name: str
  records: tuple

  def open(self):
    return self

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    record = self.records[index]
    if isinstance(record, BadRecordError):
      raise record
    return record


def captions(count, words=12):
  """Records with captions of about so many words."""
  rng = random.Random(count)
  return tuple(
    Record(
      f'caption/{n}',
      (_PICTURES[n % 4],),
      (40, 30),
      captions=(f'{n} ' + 'word ' * rng.randint(1, 2 * words),),
    )
    for n in range(count)
  )


def questions(count, asked=3):
  return tuple(
    Record(
      f'question/{n}',
      (_PICTURES[n % 4],),
      (40, 30),
      questions=tuple(Qa(f'{n}, {q}?', 'yes') for q in range(asked)),
      regions=(Region('it', ((1, 2, 3, 4),)),),
    )
    for n in range(count)
  )


def documents(count):
  rng = random.Random(count)
  return tuple(
    Record(f'text/{n}', text=f'{n} ' + 'word ' * rng.randint(1, 60))
    for n in range(count)
  )
