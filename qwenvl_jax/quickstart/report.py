"""`report.html`: what a run learned, for people who would rather look.

One file without external parts: curves and pictures are embedded.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
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
.blind td { color: #99a; background: #f4f5f7; }
.abilities :is(td, th):is(:nth-child(2), :last-child) { text-align: left; }
.facts td { text-align: left; }
.gallery { display: grid; gap: 1.2rem;
           grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; }
figcaption { font-size: .85rem; } .wrong { color: #b3261e; }
.right { color: #1e7a34; }
.chat { max-width: 40rem; margin-bottom: 2rem; }
.chat p { padding: .6rem .9rem; margin: .4rem 0;
        border-radius: .8rem; background: #eef1f6; }
.chat p.model { background: #e3effd; margin-left: 3rem; }
.chat img { width: 14rem; image-rendering: pixelated; }
.chat .model img { width: 20rem; image-rendering: auto; }
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
  """One exchange of a conversation, in words.

  Attributes:
    right: whether the answer is.
    expected: the true answer.
    picture: shown with the question, if it is the first.
    drawn: the picture with the answer's boxes, if it has any.
  """

  question: str
  answer: str
  right: bool
  expected: str
  picture: Image.Image | None = None
  drawn: Image.Image | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of scores under a title.

  Attributes:
    told: whether its rows count for what the model can do, in general.
  """

  title: str
  scores: Sequence[Score]
  told: bool = True


# What the rows of tables ask, in words, and an example.
SKILLS = {
  'caption': ('say what is there', 'Describe the picture in English.'),
  'exist': ('say whether a thing is there', 'Is there a dog?'),
  'count': ('count', 'How many things are there?'),
  'colour': ('name the colour', 'What color is the background?'),
  'refer, one object': ('find a thing that is alone', 'Find the dog.'),
  'refer, several objects': ('find a thing among others', 'Find the dog.'),
  'refer, several boxes': ('find all of a kind', 'Find the two dogs.'),
  'name_box': ('name what is in a box', 'What is in (80,120),(410,560)?'),
  'grounded_caption': (
    'say what is there and where',
    'Describe the picture with boxes.',
  ),
  'read': ('read a word', 'Read the text.'),
  'ocr': ('read a word and find it', 'Read the text and show where it is.'),
  'side': ('tell left from right', 'Is the dog on the left or the right?'),
  'left_of': ('compare places', 'Is the dog to the left of the car?'),
  'easy_vqa': ('answer about shapes', 'What color is the circle?'),
  'which': ('of two pictures: pick one', 'Which picture has a dog?'),
  'nth_caption': ('of two pictures: describe one', 'Describe picture 2.'),
  'nth_count': (
    'of two pictures: count in one',
    'How many dogs are in picture 2?',
  ),
  'nth_colour': (
    'of two pictures: name the colour of one',
    'What color is the background of picture 2?',
  ),
}


def write(
  path: Path,
  *,
  title: str,
  facts: dict[str, str],
  runs: dict[str, Path],
  tables: Sequence[Table],
  floors: dict[str, Floor],
  examples: Mapping[str, Sequence[tuple[Image.Image, Answered]]],
  conversations: Sequence[Sequence[Turn]],
):
  """Writes the report.

  Args:
    examples: by title, pictures with answers that have boxes.
  """
  body = [
    '<p>A small Qwen-VL, trained on this machine through the three stages of '
    'the paper, and asked about pictures that it has never seen.</p>',
    '<h2>What it can do</h2><p>Share of right answers, both languages '
    'together. <b>Guessing</b> is the better of two ways to answer without '
    'looking: the same model shown a grey picture, and always the most '
    'frequent answer.</p>',
    _abilities(tables),
    '<h2>Conversations</h2><p>The first scenes of their kind, whatever the '
    'answers.</p>',
    *map(_conversation, conversations),
    *(
      f'<h2>{escape(name)}</h2><p>Boxes of the answer carry its words, the '
      f'true ones the word <i>true</i>.</p>{_gallery(shown)}'
      for name, shown in examples.items()
      if shown
    ),
    '<h2>Loss</h2>',
    _curves(runs),
    '<h2>All scores</h2><p>Share of right answers. <b>blank</b> is the same '
    'model shown a grey picture, <b>majority</b> always gives the most '
    'frequent answer: what lies above both was read from pixels; rows that do '
    'not are grey and marked. <b>floor</b> is what is expected of this recipe: '
    'a score far below it says that something went wrong, one a little below '
    'it may be chance (of 250 answers, a share varies by 0.06). <b>aim</b> is '
    'what would be good at this size.</p>',
    _below(tables, floors),
    *(_table(table, floors) for table in tables),
    '<h2>This run</h2>',
    '<div class="facts">',
    html_page.table((), ([escape(k), escape(v)] for k, v in facts.items())),
    '</div>',
  ]
  buckets.write(path, html_page.page(title, ''.join(body), _STYLE))


def _below(tables: Sequence[Table], floors: dict[str, Floor]) -> str:
  short = [
    f'{table.title}: {_words(score.name)} ({score.language}) '
    f'{score.accuracy:.3f}, floor {floors[score.name].least:.3f}'
    for table in tables
    for score in table.scores
    if score.name in floors and score.accuracy < floors[score.name].least
  ]
  if not short:
    return '<p class="good">Every score reaches its floor.</p>'
  lines = ''.join(f'<li>{escape(line)}</li>' for line in short)
  return f'<div class="short">Below their floor:<ul>{lines}</ul></div>'


def _words(name: str) -> str:
  return SKILLS[name][0] if name in SKILLS else name


def _guess(scores: Sequence[Score]) -> float:
  """The better way to answer without looking, as a share of right answers."""
  return max(_mean(scores, 'blank'), _mean(scores, 'majority'))


def _mean(scores: Sequence[Score], what: str) -> float:
  count = sum(score.count for score in scores)
  return sum(getattr(score, what) * score.count for score in scores) / count


def _abilities(tables: Sequence[Table]) -> str:
  """A row for each skill, the best first; the last stage counts."""
  skills = {}
  for table in tables:
    if table.told:
      found = {}
      for score in table.scores:
        found.setdefault(score.name, []).append(score)
      skills |= found
  rows = []
  ranked = sorted(skills.items(), key=lambda x: -_mean(x[1], 'accuracy'))
  for name, scores in ranked:
    right, guess = _mean(scores, 'accuracy'), _guess(scores)
    verdict, kind = 'hardly', 'short'
    if right <= guess:
      verdict, kind = 'no, guessing does as well', 'blind'
    elif right >= 0.75:
      verdict, kind = 'yes', 'good'
    elif right >= 0.5:
      verdict, kind = 'mostly', 'good'
    elif right >= 0.25:
      verdict, kind = 'sometimes', ''
    example = SKILLS[name][1] if name in SKILLS else ''
    cells = [
      *(escape(_words(name)), f'<i>{escape(example)}</i>'),
      *(f'<b>{right:.2f}</b>', f'{guess:.2f}', verdict),
    ]
    rows.append((kind, cells))
  head = ('what', 'for instance', 'right', 'guessing', 'can it?')
  return f'<div class="abilities">{html_page.table(head, rows)}</div>'


def _table(table: Table, floors: dict[str, Floor]) -> str:
  head = (
    *('question', 'language', 'n', 'right', 'blank', 'majority'),
    *('floor', 'aim', ''),
  )
  rows = []
  for score in table.scores:
    floor = floors.get(score.name)
    kind = mark = ''
    if floor:
      kind = 'good' if score.accuracy >= floor.least else 'short'
    if score.accuracy <= _guess([score]):
      above = 'blank' if score.blank >= score.majority else 'majority'
      kind, mark = 'blind', f'not above {above}'
    cells = [
      escape(_words(score.name)),
      score.language,
      str(score.count),
      f'<b>{score.accuracy:.3f}</b>',
      f'{score.blank:.3f}',
      f'{score.majority:.3f}',
      f'{floor.least:.2f}' if floor else '',
      f'{floor.aim:.2f}' if floor else '',
      mark,
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
    asked = grounding.parse(question.prompt)
    answer = grounding.parse(answered.answer)
    # A question that names a thing is answered by a box alone.
    named = asked.places[0].ref if asked.places else asked.text
    places = [
      dataclasses.replace(place, ref=place.ref or named)
      for place in answer.places
    ]
    truth = grounding.Place('true', question.boxes)
    drawn, _ = drawing.draw(picture, [*places, truth])
    verdict = 'right' if answered.correct else 'wrong'
    overlap = '' if answered.iou is None else f', overlap {answered.iou:.2f}'
    said = answer.text or ('' if places else answered.answer)
    figures.append(
      f'<figure>{html_page.picture(drawn)}'
      f'<figcaption>{escape(asked.text)}<br>{escape(said)} '
      f'<span class="{verdict}">{verdict}{overlap}</span>'
      '</figcaption></figure>'
    )
  return f'<div class="gallery">{"".join(figures)}</div>'


def _conversation(turns: Sequence[Turn]) -> str:
  parts = []
  for turn in turns:
    shown = ''
    if turn.picture is not None:
      shown = f'{html_page.picture(turn.picture)}<br>'
    parts.append(f'<p>{shown}{escape(turn.question)}</p>')
    drawn = ''
    if turn.drawn is not None:
      drawn = f'<br>{html_page.picture(turn.drawn)}'
    verdict = 'right' if turn.right else 'wrong'
    said = '' if turn.right else f': {escape(turn.expected)}'
    parts.append(
      f'<p class="model">{escape(turn.answer)}{drawn}<br>'
      f'<small class="{verdict}">{verdict}{said}</small></p>'
    )
  return f'<div class="chat">{"".join(parts)}</div>'
