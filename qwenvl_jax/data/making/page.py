"""A picture of a page and what is written on it where."""

import dataclasses
import io
import re

from PIL import Image

from qwenvl_jax.data.records import Word
from qwenvl_jax.text import special_tokens

Quad = tuple[tuple[float, float], ...]

# White space of any kind, and signs that no one sees.
_UNSEEN = re.compile(
  '[\x00-\x1f\x7f\xad\u200b-\u200f\u202a-\u202e\u2060\ufeff]'
)


class RefusedError(Exception):
  """A page that cannot be learned from; the text is the reason, in one word."""


@dataclasses.dataclass(frozen=True)
class Page:
  """A picture and its lines of text (pixels), in reading order."""

  picture: Image.Image
  lines: tuple[Word, ...]

  def jpeg(self, quality: int) -> bytes:
    encoded = io.BytesIO()
    self.picture.save(encoded, 'JPEG', quality=quality)
    return encoded.getvalue()


def readable(text: str) -> str:
  """One line as it is read: single spaces, nothing unseen.

  Empty if it holds a special token, which no text to learn may hold.
  """
  text = ' '.join(_UNSEEN.sub(' ', text).split())
  return '' if special_tokens.find(text) else text


def upright(left: float, top: float, right: float, bottom: float) -> Quad:
  """The quad of an upright box."""
  return (left, top), (right, top), (right, bottom), (left, bottom)
