"""Pages of pictures with question, answer, truth and boxes."""

import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from qwenvl_jax.data import html_page
from qwenvl_jax.errors import QwenVLError
from qwenvl_jax.eval.task import Example, Item, Task
from qwenvl_jax.text import drawing, grounding

# Longer side of a picture on a page, and characters of a text.
_SIDE = 448
_CHARACTERS = 1000

_STYLE = """
.gallery { display: grid; gap: 1.2rem;
           grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
figure { margin: 0; overflow-wrap: anywhere; } figure img { max-width: 100%; }
figcaption { font-size: .85rem; } .wrong { color: #b3261e; }
.right { color: #1b6e32; } pre { white-space: pre-wrap; margin: .2rem 0;
                                 font: inherit; color: #445; }
select { font: inherit; }
"""

_FILTER = """
<p>Task: <select onchange="for (const x of document.querySelectorAll('figure'))
x.hidden = this.value !== '' && x.dataset.task !== this.value">
<option value="">all</option>%s</select></p>
"""


class Shown(NamedTuple):
  """A figure: one example and what was said to it, by one model or more.

  Attributes:
    answers: items of the example by who said it.
  """

  task: Task
  example: Example
  answers: dict[str, Item]


def worst(
  task: Task, items: Sequence[Item], examples: Sequence[Example], count: int
) -> list[Shown]:
  """The items of the lowest scores, in order; of equals the first ones."""
  by_key = {example.key: example for example in examples}
  scored = [item for item in items if task.metric in item.scores]
  scored = scored or [item for item in items if item.scores]
  order = sorted(scored, key=lambda item: _score(task, item))
  return [
    Shown(task, by_key[item.example.key], {'': item}) for item in order[:count]
  ]


def page(
  title: str, figures: Mapping[str, tuple[str, str]], first: str = ''
) -> str:
  """A page of figures, with a filter by task where there are several.

  Args:
    figures: name of a task to its title and the HTML of its `figures`.
  """
  choice = ''
  if len(figures) > 1:
    options = ''.join(
      f'<option value="{html.escape(name)}">{html.escape(about)}</option>'
      for name, (about, _) in figures.items()
    )
    choice = _FILTER % options
  about = (
    '<p>Boxes of an answer carry its phrase or a number, true ones the word '
    '<i>true</i>.</p>'
  )
  shown = ''.join(found for _, found in figures.values())
  body = f'{first}{about}{choice}<div class="gallery">{shown}</div>'
  return html_page.page(title, body, _STYLE)


def figures(shown: Iterable[Shown]) -> str:
  """HTML of figures, for `page`."""
  return '\n'.join(map(_figure, shown))


def _figure(shown: Shown) -> str:
  example, task = shown.example, shown.task
  target = example.target
  if not isinstance(target, str):
    target = json.dumps(target, ensure_ascii=False, default=str)
  said = ''.join(
    f'<p class="{"right" if _score(task, item) >= 1 else "wrong"}">'
    f'{html.escape(f"{name}: " if name else "")}'
    f'<b>{_short(item.text)}</b>{_scores(item)}</p>'
    for name, item in shown.answers.items()
  )
  return (
    f'<figure data-task="{html.escape(task.name)}">{_pictures(shown)}'
    f'<figcaption><small>{html.escape(task.title)} · '
    f'{html.escape(example.key)}</small><pre>{_short(_question(example))}</pre>'
    f'{said}<p>true: {_short(target)}</p></figcaption></figure>'
  )


def _score(task: Task, item: Item) -> float:
  found = item.scores
  return found.get(task.metric, min(found.values(), default=0.0))


def _scores(item: Item) -> str:
  scores = ', '.join(f'{k} {v:.2f}' for k, v in item.scores.items())
  return f' <small>{html.escape(scores)}</small>'


def _question(example: Example) -> str:
  return ''.join(
    part if isinstance(part, str) else '▣ ' for part in example.prompt.parts
  )


def _short(text: str) -> str:
  if len(text) > _CHARACTERS:
    text = f'…{text[-_CHARACTERS:]}'
  return html.escape(text)


def _pictures(shown: Shown) -> str:
  """The pictures of an example; boxes on the last one, as the release does."""
  found = []
  pictures = shown.example.prompt.pictures
  for number, source in enumerate(pictures, 1):
    try:
      picture = source.open()
    except QwenVLError as error:
      found.append(f'<p class="wrong">{html.escape(str(error))}</p>')
      continue
    picture.thumbnail((_SIDE, _SIDE))
    if number == len(pictures):
      places = _places(shown)
      if places:
        picture, _ = drawing.draw(picture, places)
    found.append(_jpeg(picture))
  return ''.join(found)


def _jpeg(picture: Image.Image) -> str:
  encoded = io.BytesIO()
  picture.save(encoded, 'jpeg', quality=85)
  return html_page.picture(encoded.getvalue(), 'jpeg')


def _places(shown: Shown) -> list[grounding.Place]:
  places = []
  # A prompt may end where a box has begun.
  last = shown.example.prompt.parts[-1]
  begun = '<box>' if isinstance(last, str) and last.endswith('<box>') else ''
  for name, item in shown.answers.items():
    for place in grounding.parse(begun + item.text).places:
      label = f'{name} {place.ref}'.strip()
      places.append(grounding.Place(label, place.boxes, place.quads))
  if shown.example.boxes:
    boxes = [tuple(map(round, box)) for box in shown.example.boxes]
    places.append(grounding.Place('true', tuple(boxes)))
  return [place for place in places if place.boxes or place.quads]
