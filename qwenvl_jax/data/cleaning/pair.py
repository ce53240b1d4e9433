"""A picture with its text, and what the rules of cleaning make of it."""

import contextlib
import dataclasses
import functools
import io
import warnings
from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from qwenvl_jax import image
from qwenvl_jax.errors import DataError

# What a pair is dropped for when its picture cannot be opened, whichever rule
# was the first to look at it.
UNREADABLE = 'unreadable_image'


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
  """An encoded picture, opened only as far as a rule asks."""

  encoded: bytes

  @functools.cached_property
  def size(self) -> tuple[int, int]:
    """Width and height by the header; pixels are not decoded.

    Raises:
      DataError: not a picture.
    """
    try:
      with warnings.catch_warnings():
        # A bomb is refused when it is decoded; here only its size is read.
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(self.encoded)) as opened:
          return opened.size
    except Image.DecompressionBombError as error:
      raise DataError(f'more than {image.MAX_PIXELS:,} pixels') from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
      raise DataError(f'not a readable picture ({error})') from error

  @functools.cached_property
  def decoded(self) -> Image.Image:
    """The picture as RGB, all of it.

    Raises:
      DataError: not a picture, cut off, or too large.
    """
    return image.load(self.encoded)


@dataclasses.dataclass(frozen=True)
class Pair:
  """A picture and its text, as a source has them.

  Attributes:
    id: names the pair within its source, for reports and errors.
    source: name of the data set.
    text: the caption.
    picture: its picture.
    score: the data set's own CLIP similarity; None if it gives none.
  """

  id: str
  source: str
  text: str
  picture: Picture
  score: float | None = None

  def with_text(self, text: str) -> 'Pair':
    """The pair with another text; itself if that is the one it has."""
    return self if text == self.text else dataclasses.replace(self, text=text)


@dataclasses.dataclass(frozen=True)
class Drop:
  """A rule's answer to a pair that it does not let pass, with its reason."""

  detail: str


class Rule(Protocol):
  """A function pair -> pair (perhaps with another text) or `Drop`.

  `name` is what reports call it. A rule sees one pair and nothing else, so that
  shards can be cleaned anywhere in any order.
  """

  name: str

  def __call__(self, pair: Pair) -> Pair | Drop: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What reading it, or all rules together, say of a pair.

  Attributes:
    pair: with its text cleaned, also if it is dropped.
    reason: name of the rule that dropped it, or why it cannot be read (a key of
      `record_errors.DROPPED`); '' if it is kept.
    detail: that rule's words.
    changed: names of the rules that changed the text, in order.
  """

  pair: Pair
  reason: str = ''
  detail: str = ''
  changed: tuple[str, ...] = ()


def clean(pair: Pair, rules: Sequence[Rule]) -> Outcome:
  """Applies the rules in order; the first that drops the pair decides."""
  changed = []
  for rule in rules:
    try:
      answer = rule(pair)
    except DataError as error:
      return Outcome(pair, UNREADABLE, str(error), tuple(changed))
    if isinstance(answer, Drop):
      return Outcome(pair, rule.name, answer.detail, tuple(changed))
    if answer.text != pair.text:
      changed.append(rule.name)
    pair = answer
  return Outcome(pair, changed=tuple(changed))


def thumbnail(picture: Picture) -> bytes:
  """A small JPEG for reports; empty if the picture cannot be opened."""
  with contextlib.suppress(DataError):
    small = picture.decoded.copy()
    small.thumbnail((96, 96))
    encoded = io.BytesIO()
    small.save(encoded, 'JPEG', quality=70)
    return encoded.getvalue()
  return b''
