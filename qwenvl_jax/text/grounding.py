"""Places in text: `<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>` and `<quad>`.

Coordinates are integers in [0,1000), thousandths of the picture's width and
height. Text that people or builders write is checked and refused with a reason
(`check_tags`); text that a model writes may stop or stray anywhere, and is read
as far as it makes sense (`parse`), never refused.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from qwenvl_jax.errors import DataError

SCALE = 1000  # units per side; the release's RefCOCO scoring divides by 999

Box = tuple[int, int, int, int]  # x1, y1, x2, y2
Quad = tuple[int, int, int, int, int, int, int, int]  # four corners, in order

_TAG = re.compile(r'<(/?)(img|ref|box|quad)>')
# A span up to its closing tag, else up to the next tag or the end.
_SPAN = re.compile(
  r'<(?P<tag>img|ref|box|quad)>(?P<inside>.*?)'
  r'(?:(?P<closed></(?P=tag)>)'
  r'|(?=</?(?:img|ref|box|quad)>|<\|(?:endoftext|im_start|im_end)\|>|\Z))',
  re.DOTALL,
)
_SHAPE = re.compile(r'<(img|box|quad)>(.*?)</\1>', re.DOTALL)
_TAGS = tuple(
  f'<{slash}{tag}>'
  for tag in ('img', 'ref', 'box', 'quad')
  for slash in ('', '/')
)
# What may become a tag.
_BEGUN = {tag[:count] for tag in _TAGS for count in range(1, len(tag))}
# Characters of a box that is still being written; more are none.
_LONGEST = 500
_IMAGE = re.compile(r'<img>.*?(?:</img>|\Z)|</img>|<imgpad>', re.DOTALL)
# Nine digits at most: int() of a model's endless digits must not fail.
_POINT = r'\s*\(\s*(\d{1,9})\s*,\s*(\d{1,9})\s*\)\s*'
_POINTS = {
  'box': re.compile(','.join([_POINT] * 2)),
  'quad': re.compile(','.join([_POINT] * 4)),
}


@dataclasses.dataclass(frozen=True)
class Place:
  """A phrase and where it is; boxes without a phrase have `ref` ''."""

  ref: str = ''
  boxes: tuple[Box, ...] = ()
  quads: tuple[Quad, ...] = ()

  def __str__(self) -> str:
    """The text that a model reads and writes."""
    ref = f'<ref>{self.ref}</ref>' if self.ref else ''
    boxes = ''.join(map(format_box, self.boxes))
    return ref + boxes + ''.join(map(format_quad, self.quads))


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a model's text says.

  Attributes:
    text: as a person would read it: phrases stay, tags, boxes and images go.
    places: phrases and boxes, in reading order.
    leftovers: spans that could not be read: unfinished or malformed.
  """

  text: str
  places: tuple[Place, ...]
  leftovers: tuple[str, ...]


def format_box(box: Sequence[int]) -> str:
  """`(10, 20, 300, 400)` -> `<box>(10,20),(300,400)</box>`."""
  return f'<box>{_points(box, 4, "box")}</box>'


def format_quad(quad: Sequence[int]) -> str:
  """Eight numbers -> `<quad>(x1,y1),(x2,y2),(x3,y3),(x4,y4)</quad>`."""
  return f'<quad>{_points(quad, 8, "quad")}</quad>'


def from_pixels(points: Sequence[float], size: tuple[int, int]) -> tuple:
  """Pixels -> thousandths, rounded, within [0,1000).

  Args:
    points: x, y, x, y, ...: a box or a quad.
    size: width and height of the picture.
  """
  return tuple(
    min(max(round(value * SCALE / size[i % 2]), 0), SCALE - 1)
    for i, value in enumerate(points)
  )


def to_pixels(
  points: Sequence[int], size: tuple[int, int], scale: int = SCALE
) -> tuple[float, ...]:
  """Thousandths -> pixels, as float.

  Args:
    points: x, y, x, y, ...: a box or a quad.
    size: width and height of the picture.
    scale: 1000; 999 to score as the release scores RefCOCO.
  """
  return tuple(v * size[i % 2] / scale for i, v in enumerate(points))


def check_tags(
  text: str, record: str = 'the text', unfinished: bool = False
) -> None:
  """Refuses text whose tags do not pair up.

  Args:
    text: what will be trained or evaluated on.
    record: what an error names.
    unfinished: allow the last tag to be open, as in a prompt that ends in
      `<box>`. An `<img>` is never allowed to be.

  Raises:
    DataError: a tag is not closed, not opened, or inside another.
  """
  opened, start = None, 0
  for match in _TAG.finditer(text):
    closing, tag = match.groups()
    if closing and tag == opened:
      opened = None
    elif closing:
      raise DataError(
        f'{record}: </{tag}> at character {match.start()} closes nothing '
        f'({_excerpt(text, match.start())}); write <{tag}> before it or '
        'remove it'
      )
    elif opened:
      break
    else:
      opened, start = tag, match.start()
  else:
    if opened is None or (unfinished and opened != 'img'):
      return
  raise DataError(
    f'{record}: <{opened}> at character {start} is not closed '
    f'({_excerpt(text, start)}); write </{opened}> where it ends or remove it'
  )


def has_places(text: str) -> bool:
  """Returns whether there is a box or a quad in the text."""
  return '<box>' in text or '<quad>' in text


def map_places(
  text: str, turn: Callable[[tuple[int, ...]], Sequence[float]], record: str
) -> str:
  """Replaces the numbers of every box and quad of a text.

  Args:
    text: its tags pair up (`check_tags`).
    turn: takes x, y, x, y, .. in thousandths and returns as many, which are
      put within [0,1000).
    record: what an error names.

  Raises:
    DataError: a box or quad whose numbers are not in thousandths.
  """

  def replaced(match: re.Match) -> str:
    tag, inside = match['tag'], match['inside']
    if tag not in _POINTS:
      return match[0]
    found = _POINTS[tag].fullmatch(inside)
    values = tuple(map(int, found.groups())) if found else ()
    if not values or max(values) > SCALE:
      raise DataError(
        f'{record}: {match[0]!r:.80} is not in thousandths of the picture; '
        'write <box>(x1,y1),(x2,y2)</box> with whole numbers from 0 to 999, '
        'whatever its size in pixels'
      )
    mapped = from_pixels(turn(values), (SCALE, SCALE))
    # As it was written, white space and all, where nothing changes.
    if mapped == values:
      return match[0]
    return f'<{tag}>{_points(mapped, len(mapped), tag)}</{tag}>'

  return _SPAN.sub(replaced, text)


def parse(text: str) -> Answer:
  """Reads an answer, finished or not; never fails.

  A phrase owns the boxes and quads that follow it with nothing but white space
  between. A box whose numbers are all there counts even if its closing tag is
  missing, and a phrase whose closing tag is missing counts if a box follows.

  >>> parse('a <ref>dog</ref><box>(1,2),(3,4)</box> and <ref>a c').places
  (Place(ref='dog', boxes=((1, 2, 3, 4),), quads=()),)
  """
  places, leftovers, plain = [], [], []
  at = 0
  owner = False  # whether the last place may take what comes next
  for match in _SPAN.finditer(text):
    between = text[at : match.start()]
    plain.append(between)
    owner = owner and not _strip(between)
    at = match.end()
    tag, inside, closed = match.group('tag', 'inside', 'closed')
    if tag == 'img':
      owner = False
      if not closed:
        leftovers.append(match.group())
    elif tag == 'ref':
      boxed = text.startswith(('<box>', '<quad>'), at)
      owner = bool(closed) or boxed
      plain.append(inside)
      if owner:
        places.append(Place(inside.strip()))
      else:
        leftovers.append(match.group())
    else:
      points = _POINTS[tag]
      found = points.fullmatch(inside) if closed else points.match(inside)
      if found is None:
        leftovers.append(match.group())
        continue
      if not closed:
        at = match.start('inside') + found.end()
      if not owner:
        places.append(Place())
        owner = True
      places[-1] = _add(places[-1], tag, tuple(map(int, found.groups())))
  plain.append(text[at:])
  text = re.sub(r'</?(?:ref|box|quad|img)>', '', ''.join(plain))
  return Answer(text.strip(), tuple(places), tuple(leftovers))


def stream_words(pieces: Iterable[str]) -> Iterator[str]:
  """Yields an answer as a person would read it, while it is being written.

  Phrases stay, tags go. A box or quad that follows its phrase goes, too;
  another becomes `[N]`, its number among all of them, as `drawing.draw` labels
  it. What is neither stays as it was written.

  Args:
    pieces: of the text, cut anywhere.

  >>> ''.join(stream_words(['<ref>a d', 'og</ref><box>(1,2),(3,4)</b', 'ox>.']))
  'a dog.'
  """
  held, shapes, owned = '', 0, False
  for piece in itertools.chain(pieces, (None,)):
    held += piece or ''
    while held:
      before, mark, rest = held.partition('<')
      if before:
        owned = owned and not before.strip()
        yield before
      held = mark + rest
      tag, shape = _TAG.match(held), _SHAPE.match(held)
      if shape:
        held = held[shape.end() :]
        kind, inside = shape.groups()
        if kind in _POINTS and not _POINTS[kind].fullmatch(inside):
          yield shape[0]
        elif kind in _POINTS:
          shapes += 1
          if not owned:
            yield f'[{shapes}]'
      elif tag and (tag[1] or tag[2] == 'ref'):
        owned = owned or tag[0] == '</ref>'
        held = held[tag.end() :]
      elif (
        (tag or held in _BEGUN) and piece is not None and len(held) < _LONGEST
      ):
        break  # The rest of it is to come.
      elif held:
        yield held[0]
        held = held[1:]


def first_box(text: str) -> Box | None:
  """The first `(x1,y1),(x2,y2)` anywhere in the text, tags or not."""
  found = _POINTS['box'].search(text)
  return tuple(map(int, found.groups())) if found else None


def without_images(text: str) -> str:
  """The text with every `<img>` span or stray image tag taken out.

  For a model's own words before they go back into a chat: an image that it made
  up has no pixels.
  """
  return _IMAGE.sub('', text)


def _points(values: Iterable[int], count: int, name: str) -> str:
  values = list(values)
  if len(values) != count:
    raise DataError(
      f'a {name} needs {count} numbers, not {len(values)}: {values}'
    )
  points = zip(values[::2], values[1::2], strict=True)
  return ','.join(f'({int(x)},{int(y)})' for x, y in points)


def _add(place: Place, tag: str, points: tuple[int, ...]) -> Place:
  if tag == 'box':
    return dataclasses.replace(place, boxes=(*place.boxes, points))
  return dataclasses.replace(place, quads=(*place.quads, points))


def _strip(between: str) -> str:
  return re.sub(r'</(?:ref|box|quad)>', '', between).strip()


def _excerpt(text: str, at: int) -> str:
  return repr(text[at : at + 40] + ('...' if len(text) > at + 40 else ''))
