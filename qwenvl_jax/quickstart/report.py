"""`report.html`: what a run learned, for people who would rather look.

One file without external parts: curves and pictures are embedded.
"""

import dataclasses
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from qwenvl_jax import buckets
from qwenvl_jax.data import html_page
from qwenvl_jax.eval import curves
from qwenvl_jax.eval.tasks.scenes import Answered, Score
from qwenvl_jax.text import drawing, grounding

_STYLE = """
.short { background: #fdecea; } .good { background: #eaf6ec; }
.gallery { display: grid; gap: 1.2rem;
           grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; }
figcaption { font-size: .85rem; } .wrong { color: #b3261e; }
.chat { max-width: 40rem; } .chat p { padding: .6rem .9rem; margin: .4rem 0;
        border-radius: .8rem; background: #eef1f6; }
.chat p.model { background: #e3effd; margin-left: 3rem; }
.chat img { width: 14rem; image-rendering: pixelated; }
svg { max-width: 100%; height: auto; }
"""


@dataclasses.dataclass(frozen=True)
class Floor:
  """What a row of the table should reach.

  Attributes:
    least: below it a row falls short.
    aim: what would be good.
  """

  least: float
  aim: float


@dataclasses.dataclass(frozen=True)
class Turn:
  """One exchange of the transcript.

  Attributes:
    pictures: shown with the question.
    drawn: the picture with the answer's boxes, if it has any.
  """

  question: str
  answer: str
  pictures: tuple[Image.Image, ...] = ()
  drawn: Image.Image | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of scores under a title."""

  title: str
  scores: Sequence[Score]


def write(
  path: Path,
  *,
  title: str,
  facts: dict[str, str],
  runs: dict[str, Path],
  tables: Sequence[Table],
  floors: dict[str, Floor],
  examples: Sequence[tuple[Image.Image, Answered]],
  transcript: Sequence[Turn],
):
  """Writes the report.

  Args:
    path: of the HTML file.
    title: heading.
    facts: what to say first, name to value.
    runs: name of a stage to its folder with `log.jsonl`.
    tables: of scores.
    floors: by row name, see `Floor`.
    examples: pictures with answers that have boxes.
    transcript: a conversation.
  """
  short = [
    f'{table.title}: {score.name} ({score.language}) '
    f'{score.accuracy:.2f} &lt; {floors[score.name].least:.2f}'
    for table in tables
    for score in table.scores
    if score.name in floors and score.accuracy < floors[score.name].least
  ]
  below = '<p class="good">Every score reaches its floor.</p>'
  if short:
    lines = ''.join(f'<li>{line}</li>' for line in short)
    below = f'<div class="short">Below their floor:<ul>{lines}</ul></div>'
  body = [
    html_page.table((), ([escape(k), escape(v)] for k, v in facts.items())),
    '<h2>Scores on held-out scenes</h2>',
    '<p>Share of right answers. <b>blank</b> is the same model shown a grey '
    'picture, <b>majority</b> always gives the most frequent answer: what lies '
    'above both was read from pixels.</p>',
    below,
    *(_table(table, floors) for table in tables),
    '<h2>Loss</h2>',
    _curves(runs),
    '<h2>Boxes</h2><p>Predicted boxes carry the phrase, true ones the word '
    '<i>true</i>.</p>',
    _gallery(examples),
    '<h2>A conversation</h2>',
    _transcript(transcript),
  ]
  buckets.write(path, html_page.page(title, ''.join(body), _STYLE))


def _table(table: Table, floors: dict[str, Floor]) -> str:
  head = (
    'question', 'language', 'n', 'right', 'blank', 'majority', 'floor', 'aim',
  )  # fmt: skip
  rows = []
  for score in table.scores:
    floor = floors.get(score.name)
    kind = ''
    if floor:
      kind = 'good' if score.accuracy >= floor.least else 'short'
    cells = [
      escape(score.name),
      score.language,
      str(score.count),
      f'<b>{score.accuracy:.3f}</b>',
      f'{score.blank:.3f}',
      f'{score.majority:.3f}',
      f'{floor.least:.2f}' if floor else '',
      f'{floor.aim:.2f}' if floor else '',
    ]
    rows.append((kind, cells))
  return f'<h3>{escape(table.title)}</h3>{html_page.table(head, rows)}'


def _curves(runs: dict[str, Path]) -> str:
  figure = curves.draw(runs)
  buffer = io.StringIO()
  figure.savefig(buffer, format='svg')
  svg = buffer.getvalue()
  return svg[svg.index('<svg') :]


def _gallery(examples: Sequence[tuple[Image.Image, Answered]]) -> str:
  figures = []
  for picture, answered in examples:
    question = answered.question
    answer = grounding.parse(answered.answer)
    truth = grounding.Place('true', question.boxes)
    drawn, _ = drawing.draw(picture, [*answer.places, truth])
    verdict = '' if answered.correct else ' class="wrong"'
    overlap = '' if answered.iou is None else f' IoU {answered.iou:.2f}'
    figures.append(
      f'<figure>{html_page.picture(drawn)}'
      f'<figcaption{verdict}>{escape(question.prompt)}<br>'
      f'{escape(answer.text or answered.answer)}{overlap}'
      '</figcaption></figure>'
    )
  return f'<div class="gallery">{"".join(figures)}</div>'


def _transcript(turns: Sequence[Turn]) -> str:
  parts = []
  for turn in turns:
    shown = ' '.join(map(html_page.picture, turn.pictures))
    parts.append(f'<p>{shown}{"<br>" * bool(shown)}')
    parts.append(f'{escape(turn.question)}</p>')
    drawn = ''
    if turn.drawn is not None:
      drawn = f'<br>{html_page.picture(turn.drawn)}'
    answer = escape(turn.answer)
    parts.append(f'<p class="model">{answer}{drawn}</p>')
  return f'<div class="chat">{"".join(parts)}</div>'
