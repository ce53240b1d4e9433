"""Brings a record into order before it is stored: boxes, tags, pictures.

What can be repaired is, what cannot is dropped; `bad` lists the rules.
"""

import dataclasses
from collections.abc import Callable

from qwenvl_jax import image
from qwenvl_jax.data.records import Box, Record
from qwenvl_jax.errors import BadRecordError
from qwenvl_jax.text import special_tokens


def mend(record: Record) -> tuple[Record, list[str]]:
  """A record that can be stored, and what was repaired (`bad.REPAIRED`).

  Every picture is decoded once, so that what is stored can be read. Boxes are
  sorted and clipped, plain text loses what looks like a special token: written
  by a stranger it would end documents and open images.

  Args:
    record: its images are bytes.

  Raises:
    BadRecordError: a picture that cannot be read, or nothing left to learn.
  """
  notes = []
  sizes = []
  for data in record.images:
    sizes.append(image.load(data, record.id, notes, image.MIN_SIDE).size)
  size = record.size if min(record.size) > 0 else (sizes or [(0, 0)])[0]
  plain = _Plain(notes)
  boxes = _Boxes(size, notes)
  mended = dataclasses.replace(
    record,
    size=size,
    captions=tuple(filter(None, map(plain, record.captions))),
    questions=tuple(
      dataclasses.replace(
        x,
        question=plain(x.question),
        answer=plain(x.answer),
        answers=tuple(map(plain, x.answers)),
        options=tuple(map(plain, x.options)),
        context=plain(x.context),
      )
      for x in record.questions
      if plain(x.question) and plain(x.answer)
    ),
    regions=_placed(
      (dataclasses.replace(x, phrase=plain(x.phrase)) for x in record.regions),
      boxes,
    ),
    grounded=tuple(
      dataclasses.replace(x, spans=_placed(x.spans, boxes))
      for x in record.grounded
      # Without its tags, the spans would point elsewhere.
      if plain(x.text) == x.text
    ),
    words=tuple(
      dataclasses.replace(x, word=plain(x.word), quad=boxes.quad(x.quad))
      for x in record.words
      if plain(x.word) and boxes.quad(x.quad)
    ),
    text=plain(record.text),
  )
  _check_something_left(record, mended)
  return mended, notes


def _check_something_left(before: Record, after: Record) -> None:
  content = (
    after.captions, after.questions, after.regions, after.words, after.turns,
    after.text, [x for x in after.grounded if x.spans],
  )  # fmt: skip
  if any(content):
    return
  placed = before.regions or before.grounded or before.words
  reason = 'no_box' if placed else 'empty_text'
  raise BadRecordError(reason, f'{before.id}: nothing to learn is left')


@dataclasses.dataclass(frozen=True)
class _Plain:
  """Text without special tokens."""

  notes: list[str]

  def __call__(self, text: str) -> str:
    if '<' not in text:
      return text
    without = special_tokens.remove(text)
    if without != text:
      self.notes.append('special_tag')
      without = without.strip()
    return without


@dataclasses.dataclass(frozen=True)
class _Boxes:
  """Boxes within a picture."""

  size: tuple[int, int]
  notes: list[str]

  def __call__(self, box: Box) -> Box | None:
    """The box, sorted and clipped, or None if nothing is left of it."""
    x1, y1, x2, y2 = box
    # Also false for NaN.
    if not all(abs(x) < 1e9 for x in box):
      self.notes.append('dropped_box')
      return None
    if x2 < x1 or y2 < y1:
      self.notes.append('sorted_box')
      x1, x2 = sorted((x1, x2))
      y1, y2 = sorted((y1, y2))
    width, height = self.size
    clipped = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
      self.notes.append('dropped_box')
      return None
    # Annotators' rounding is no fault worth counting.
    if max(abs(a - b) for a, b in zip(clipped, (x1, y1, x2, y2))) > 1:
      self.notes.append('clipped_box')
    return clipped

  def quad(self, corners: tuple) -> tuple:
    """Corners clipped, or () if they are no four points or span nothing."""
    flat = [x for point in corners for x in point]
    if len(flat) != 8 or not all(abs(x) < 1e9 for x in flat):
      return ()
    around = (min(flat[::2]), min(flat[1::2]), max(flat[::2]), max(flat[1::2]))
    if self(around) is None:
      return ()
    width, height = self.size
    return tuple(
      (min(max(x, 0), width), min(max(y, 0), height))
      for x, y in zip(flat[::2], flat[1::2])
    )


def _placed(things, boxes: Callable[[Box], Box | None]) -> tuple:
  """Regions or spans with what is left of their boxes."""
  kept = (
    dataclasses.replace(
      x, boxes=tuple(b for b in map(boxes, x.boxes) if b is not None)
    )
    for x in things
  )
  return tuple(
    x for x in kept if x.boxes and (not hasattr(x, 'phrase') or x.phrase)
  )
