"""Records: what sources hold, before anything is asked about them.

`Record` is what every public data set becomes (`prepare`); `Scene` is that of
the quickstart.
"""

import dataclasses
from typing import NamedTuple

from qwenvl_jax.data import things

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Object:
  """An object of a scene: class id and box x1, y1, x2, y2 in pixels."""

  thing: int
  box: tuple[int, int, int, int]

  @property
  def x(self) -> float:
    """Horizontal centre."""
    return (self.box[0] + self.box[2]) / 2


@dataclasses.dataclass(frozen=True)
class Word:
  """A painted word and its corners in pixels, clockwise."""

  word: str
  quad: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture of which everything is known.

  Attributes:
    id: names the record in errors and scores.
    image: encoded picture, or anything else `image.load` takes.
    side: width and height that `objects` and `words` refer to.
    objects: left to right.
    colour: index into `things.COLOURS`.
  """

  id: str
  image: object
  side: int
  objects: tuple[Object, ...]
  colour: int
  texture: str = 'plain'
  words: tuple[Word, ...] = ()

  def of(self, thing: int) -> tuple[Object, ...]:
    """The objects of a class."""
    return tuple(x for x in self.objects if x.thing == thing)

  @property
  def classes(self) -> tuple[int, ...]:
    """Distinct class ids, ascending."""
    return tuple(sorted({x.thing for x in self.objects}))

  def colour_name(self, language: str) -> str:
    return things.COLOURS[self.colour].name(language)


class ScenePair(NamedTuple):
  """Two scenes that are asked about together."""

  first: Scene
  second: Scene

  @property
  def id(self) -> str:
    return f'{self.first.id}+{self.second.id}'

  @property
  def objects(self) -> tuple[Object, ...]:
    return self.first.objects + self.second.objects


@dataclasses.dataclass(frozen=True)
class Qa:
  """A question as people answered it.

  Attributes:
    question: the question.
    answer: what is trained on.
    answers: all that people gave, for scoring; empty if `answer` is all.
    options: what may be chosen from, `answer` among them.
    context: what is to be read before the question.
    id: of the question, as its data set calls it.
  """

  question: str
  answer: str
  answers: tuple[str, ...] = ()
  options: tuple[str, ...] = ()
  context: str = ''
  id: str = ''


@dataclasses.dataclass(frozen=True)
class Region:
  """A phrase and where it is: x1, y1, x2, y2 in pixels of the first picture."""

  phrase: str
  boxes: tuple[Box, ...]


@dataclasses.dataclass(frozen=True)
class Span:
  """Characters `start` to `end` (excluded) of a caption, and where that is."""

  start: int
  end: int
  boxes: tuple[Box, ...]


@dataclasses.dataclass(frozen=True)
class GroundedCaption:
  """A caption some of whose phrases have boxes; spans may nest."""

  text: str
  spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Turn:
  """A turn of a conversation.

  Attributes:
    role: 'user', 'assistant', or of the first 'system'.
    text: what is said.
  """

  role: str
  text: str


@dataclasses.dataclass(frozen=True)
class Record:
  """A document with pictures and everything that is known about them.

  Attributes:
    id: names the record in errors and scores.
    images: encoded pictures, in the order of the conversation's spans; before
      preparation, their paths relative to the source's folder.
    size: width and height of the first picture, which boxes refer to; (0, 0)
      if unknown.
    language: 'en' or 'zh', of everything but conversations.
    captions: descriptions of the first picture.
    questions: about the first picture.
    regions: phrases with boxes.
    grounded: captions with boxes.
    words: of the picture, in reading order, with their corners in pixels.
    turns: a conversation; `<img>..</img>` spans stand for `images`.
    text: a document without pictures.
    texts: a document with pictures: what stands before the first, between each
      two, and after the last.
    notes: keys of `record_errors.REPAIRED`: what its reader left out; not
      stored.
  """

  id: str
  images: tuple[object, ...] = ()
  size: tuple[int, int] = (0, 0)
  language: str = 'en'
  captions: tuple[str, ...] = ()
  questions: tuple[Qa, ...] = ()
  regions: tuple[Region, ...] = ()
  grounded: tuple[GroundedCaption, ...] = ()
  words: tuple[Word, ...] = ()
  turns: tuple[Turn, ...] = ()
  text: str = ''
  texts: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()


def scene(id_, image, side, objects, colour, texture='plain', words=()):
  """A `Scene` whose objects are put in order, left to right by centre."""
  objects = sorted(objects, key=lambda x: (x.x, x.box, x.thing))
  return Scene(id_, image, side, tuple(objects), colour, texture, tuple(words))
