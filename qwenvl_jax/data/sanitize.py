"""Checks a record before it is stored: pictures, boxes, special tokens.

What can be repaired is, what cannot is dropped, by the rules that
`record_errors` lists.
"""

import dataclasses
from collections.abc import Callable, Iterator

from qwenvl_jax import image
from qwenvl_jax.data.records import Box, Qa, Record
from qwenvl_jax.errors import BadRecordError
from qwenvl_jax.text import grounding, special_tokens

# Characters of a text: a hundred times what a row holds.
MAX_TEXT = 200_000


def sanitize(record: Record) -> tuple[Record, list[str]]:
  """Returns a record (its images bytes) to store, and what was repaired.

  The latter are keys of `record_errors.REPAIRED`.

  Every picture is decoded once, so that what is stored can be read. Boxes turn
  with a picture that EXIF turns, are sorted and clipped; plain text loses what
  looks like a special token: written by a stranger it would end documents and
  open images.

  Raises:
    BadRecordError: a picture that cannot be read, or nothing left to learn.
  """
  notes = list(record.notes)
  before, sizes = record, []
  record = dataclasses.replace(record, notes=())
  if record.texts:
    record = _with_readable_pictures(record, notes)
  for data in record.images:
    sizes.append(image.load(data, record.id, notes, image.MIN_SIDE).size)
  if sizes:
    record = turned(record, sizes[0])
  for turn in record.turns:
    _check_length(turn.text, record.id)
  plain = _Plain(record.id, notes)
  boxes = _Boxes(record.size, notes)
  mended = dataclasses.replace(
    record,
    captions=tuple(filter(None, map(plain, record.captions))),
    questions=tuple(_questions(record.questions, plain)),
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
      dataclasses.replace(x, word=word, quad=quad)
      for x in record.words
      if (word := plain(x.word)) and (quad := boxes.quad(x.quad))
    ),
    text=plain(record.text),
    texts=tuple(map(plain, record.texts)),
  )
  _check_something_left(before, mended)
  return mended, notes


def _questions(questions, plain) -> Iterator[Qa]:
  for asked in questions:
    question, answer = plain(asked.question), plain(asked.answer)
    if question and answer:
      yield dataclasses.replace(
        asked,
        question=question,
        answer=answer,
        answers=tuple(map(plain, asked.answers)),
        options=tuple(map(plain, asked.options)),
        context=plain(asked.context),
      )


def _with_readable_pictures(record: Record, notes: list[str]) -> Record:
  """Returns a document without the pictures that cannot be read.

  Raises:
    BadRecordError: none is left.
  """
  images, texts, error = [], [record.texts[0]], None
  for data, after in zip(record.images, record.texts[1:], strict=True):
    try:
      image.load(data, record.id, min_side=image.MIN_SIDE)
    except BadRecordError as found:
      error = found
      notes.append('missing_picture')
      texts[-1] = ' '.join(filter(None, (texts[-1], after)))
    else:
      images.append(data)
      texts.append(after)
  if not images:
    raise error or BadRecordError(
      'missing_image', f'{record.id}: a document without pictures'
    )
  return dataclasses.replace(record, images=tuple(images), texts=tuple(texts))


def turned(record: Record, shown: tuple[int, int]) -> Record:
  """Returns the record, its size and places those of the picture as shown.

  Annotations are taken to be of the stored picture, whose size they state,
  unless that is the size of the picture as EXIF shows it and not of the stored.

  Args:
    record: its places refer to `size`, or to the first picture if that is
      unknown.
    shown: width and height of the first picture, turned as EXIF says.

  Raises:
    BadRecordError: `size` is that of neither, nor of either made smaller or
      larger.
  """
  size = record.size if min(record.size) > 0 else (0, 0)
  placed = record.regions or record.grounded or record.words
  # In thousandths, and mostly without a size: turned if it says so.
  said = any(size) and any(grounding.has_places(x.text) for x in record.turns)
  if not (placed or said):
    return dataclasses.replace(record, size=shown)
  orientation = image.stored_orientation(record.images[0])
  stored = shown[::-1] if orientation >= 5 else shown
  if not any(size):
    size = stored
  elif size == shown != stored or not _alike(size, stored):
    if not _alike(size, shown):
      raise BadRecordError(
        'size_mismatch',
        f'{record.id}: its boxes are said to be of {size[0]} x {size[1]} '
        f'pixels, but the picture has {stored[0]} x {stored[1]}; give the size '
        'of the picture that was annotated',
      )
    orientation = 1
  if orientation == 1:
    return dataclasses.replace(record, size=size)

  def box(points, of=size):
    x1, y1, x2, y2 = image.turn(points, of, orientation)
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)

  def boxed(x):
    return dataclasses.replace(x, boxes=tuple(map(box, x.boxes)))

  def in_text(points):
    thousandths = (grounding.SCALE, grounding.SCALE)
    turned = image.turn(points, thousandths, orientation)
    return turned if len(turned) != 4 else box(points, thousandths)

  turns = record.turns
  if len(record.images) == 1:
    turns = tuple(
      dataclasses.replace(
        x, text=grounding.map_places(x.text, in_text, record.id)
      )
      for x in turns
    )
  return dataclasses.replace(
    record,
    size=size[::-1] if orientation >= 5 else size,
    regions=tuple(map(boxed, record.regions)),
    grounded=tuple(
      dataclasses.replace(x, spans=tuple(map(boxed, x.spans)))
      for x in record.grounded
    ),
    words=tuple(
      dataclasses.replace(
        x,
        quad=tuple(image.turn(point, size, orientation) for point in x.quad),
      )
      for x in record.words
    ),
    turns=turns,
  )


def _alike(size: tuple[int, int], other: tuple[int, int]) -> bool:
  """Returns whether one is the other resized, within a pixel of rounding."""
  difference = abs(size[0] * other[1] - size[1] * other[0])
  return difference <= max(*size, *other)


def _check_something_left(before: Record, after: Record) -> None:
  content = (
    after.captions, after.questions, after.regions, after.words, after.turns,
    after.text, [x for x in after.grounded if x.spans],
    [x for x in after.texts if x.strip()],
  )  # fmt: skip
  if any(content):
    return
  placed = before.regions or before.grounded or before.words
  reason = 'no_box' if placed else 'empty_text'
  raise BadRecordError(reason, f'{before.id}: nothing to learn is left')


def _check_length(text: str, record: str) -> None:
  if len(text) > MAX_TEXT:
    raise BadRecordError(
      'too_long',
      f'{record}: a text of {len(text):,} characters, but {MAX_TEXT:,} are '
      'read at most; divide it',
    )


@dataclasses.dataclass(frozen=True)
class _Plain:
  """Text without special tokens."""

  record: str
  notes: list[str]

  def __call__(self, text: str) -> str:
    _check_length(text, self.record)
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
