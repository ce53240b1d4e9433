"""The contents of composed documents: headings, paragraphs, lists, tables.

One description for everything that lays documents out by itself: PDF and HTML.
"""

import dataclasses
import itertools
import random
from collections.abc import Collection

from qwenvl_jax.data.making.words import Words

# Headings neither begin nor end with these.
_SIGNS = '.,;:。，；、 '


@dataclasses.dataclass(frozen=True)
class Part:
  """A part of a document.

  Attributes:
    kind: 'title', 'heading', 'paragraph', 'list', 'table' or 'picture'.
    texts: a list's items, a table's cells row by row, else one text.
    columns: of a table.
  """

  kind: str
  texts: tuple[str, ...] = ()
  columns: int = 0


def compose(
  rng: random.Random,
  words: Words,
  language: str,
  held: Collection[int] | None = None,
) -> list[Part]:
  """A document that fills a page or more.

  Args:
    rng: decides everything.
    words: what is written.
    language: 'en' or 'zh'.
    held: code points that may be used; None for all.
  """
  pieces = words.pieces(rng, language, held)

  # A Chinese piece is a character and not a word.
  more = 2 if language == 'zh' else 1

  def text(least, most):
    count = rng.randint(least * more, most * more)
    return ''.join(itertools.islice(pieces, count)).strip()

  parts = [Part('title', (text(2, 7).strip(_SIGNS),))]
  for _ in range(rng.randint(6, 16)):
    kind = rng.choices(
      ('paragraph', 'heading', 'list', 'table', 'picture'), (6, 2, 1, 1, 1)
    )[0]
    if kind == 'heading':
      parts.append(Part(kind, (text(2, 6).strip(_SIGNS),)))
    elif kind == 'paragraph':
      parts.append(Part(kind, (text(15, 90),)))
    elif kind == 'list':
      items = tuple(text(3, 14) for _ in range(rng.randint(2, 5)))
      parts.append(Part(kind, items))
    elif kind == 'table':
      columns, rows = rng.randint(2, 4), rng.randint(2, 6)
      cells = tuple(text(1, 3) for _ in range(columns * rows))
      parts.append(Part(kind, cells, columns))
    else:
      parts.append(Part(kind))
  return parts


def phrases(
  rng: random.Random,
  words: Words,
  language: str,
  held: Collection[int] | None,
  count: int,
) -> list[str]:
  """A few words each, as in a menu; arguments as for `compose`."""
  pieces = words.pieces(rng, language, held)
  length = 4 if language == 'zh' else 2
  made = (''.join(itertools.islice(pieces, length)) for _ in range(count))
  return [text.strip(_SIGNS) for text in made]
