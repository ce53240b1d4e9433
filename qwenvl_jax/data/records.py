"""Records: what sources hold, before anything is asked about them."""

import dataclasses

from qwenvl_jax.data import things


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
    image: encoded picture, or anything else `data.image.load` takes.
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
    """Distinct class ids, ordered by their leftmost object."""
    return tuple(dict.fromkeys(x.thing for x in self.objects))

  def colour_name(self, language: str) -> str:
    return things.COLOURS[self.colour].name(language)


@dataclasses.dataclass(frozen=True)
class Asked:
  """A picture with questions and answers that its source wrote.

  Attributes:
    questions: (question, answer) pairs.
  """

  id: str
  image: object
  questions: tuple[tuple[str, str], ...]


def scene(id_, image, side, objects, colour, texture='plain', words=()):
  """A `Scene` whose objects are put in order, left to right by centre."""
  objects = sorted(objects, key=lambda x: (x.x, x.box, x.thing))
  return Scene(id_, image, side, tuple(objects), colour, texture, tuple(words))
