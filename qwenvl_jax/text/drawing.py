"""Draws the boxes of an answer on its picture, a readable label on each."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from qwenvl_jax.text import fonts, grounding

# Twelve colours that stay apart from each other on most photographs.
COLOURS = (
  (230, 25, 75),
  (0, 130, 200),
  (60, 180, 75),
  (245, 130, 48),
  (145, 30, 180),
  (255, 225, 25),
  (70, 240, 240),
  (240, 50, 230),
  (128, 64, 0),
  (170, 255, 60),
  (0, 0, 140),
  (250, 190, 212),
)


def draw(
  image: Image.Image,
  places: str | grounding.Answer | Sequence[grounding.Place],
  scale: int = grounding.SCALE,
  min_side: int = 448,
) -> tuple[Image.Image, str]:
  """Draws every box and quad with its phrase, or its number if it has none.

  Equal phrases share a colour. Boxes may be inverted or reach outside.

  Args:
    image: any mode; not changed.
    places: an answer's text, what `grounding.parse` made of it, or places.
    scale: units per side of the coordinates.
    min_side: a smaller picture is enlarged by a whole number until its shorter
      side has this many pixels, or labels would cover it; 0 keeps its size.

  Returns:
    A new RGB image, and the characters of the labels that no font could show
    (they are drawn as `?`).
  """
  if isinstance(places, str):
    places = grounding.parse(places)
  if isinstance(places, grounding.Answer):
    places = places.places
  canvas = image.convert('RGB')
  factor = -(-min_side // min(canvas.size))
  # A long strip may stay thin: enlarged all the way it would not fit memory.
  factor = max(1, min(factor, 4 * min_side // max(canvas.size)))
  if factor > 1:
    canvas = canvas.resize([side * factor for side in canvas.size])
  elif canvas is image:
    canvas = image.copy()

  shapes = [
    (place.ref, points)
    for place in places
    for points in (*place.boxes, *place.quads)
  ]
  colours = {}
  labels = []
  pen = ImageDraw.Draw(canvas)
  width = max(3, min(canvas.size) // 160)
  for number, (ref, points) in enumerate(shapes, start=1):
    label = ref or str(number)
    colour = colours.setdefault(label, COLOURS[len(colours) % len(COLOURS)])
    outline = _outline(points, canvas.size, scale)
    # A dark edge keeps light colours visible on light pictures.
    for thickness, ink in ((width + 2, (40, 40, 40)), (width, colour)):
      pen.line([*outline, *outline[:2]], ink, thickness, joint='curve')
    labels.append((label, colour, outline))
  # Labels come last, so that no later box crosses them.
  taken, missing = [], {}
  size = max(13, min(canvas.size) // 26)
  for label, colour, outline in labels:
    lacking = _write(pen, canvas.size, label, colour, outline, size, taken)
    missing.update(dict.fromkeys(lacking))
  return canvas, ''.join(missing)


def _outline(
  points: Sequence[int], size: tuple[int, int], scale: int
) -> list[tuple[float, float]]:
  """Corners in pixels, within the picture."""
  pixels = grounding.to_pixels(points, size, scale)
  xs = [min(max(x, 0), size[0] - 1) for x in pixels[::2]]
  ys = [min(max(y, 0), size[1] - 1) for y in pixels[1::2]]
  if len(xs) == 2:
    (left, right), (top, bottom) = sorted(xs), sorted(ys)
    xs, ys = [left, right, right, left], [top, top, bottom, bottom]
  return list(zip(xs, ys, strict=True))


def _write(pen, bounds, label, colour, outline, size, taken) -> str:
  """Writes one label where none is yet; returns characters without a glyph."""
  font, missing = fonts.find_font(label, size)
  picture_width, picture_height = bounds
  pad = max(2, size // 6)
  text = fonts.printable(label, missing) or '?'
  text = _shorten(pen, text, font, picture_width - 2 * pad)
  # One height for all labels of a picture, whatever letters they have.
  width = pen.textlength(text, font) + 2 * pad
  height = size + 2 * pad
  left = min(x for x, _ in outline)
  top, bottom = min(y for _, y in outline), max(y for _, y in outline)
  x = max(0, min(left, picture_width - width))
  # Above the box, inside its top, inside its bottom, below; then further down.
  tries = [top - height, top, bottom - height, bottom]
  tries += [top + step * height for step in range(1, 40)]
  spots = [
    (x, y, x + width, y + height)
    for y in tries
    if 0 <= y <= picture_height - height
  ]
  # A crowded picture: better a covered label than none.
  default = (x, 0, x + width, height)
  spot = next(
    (s for s in spots if not any(_overlap(s, t) for t in taken)),
    spots[0] if spots else default,
  )
  taken.append(spot)
  pen.rectangle(spot, colour)
  red, green, blue = colour
  dark = 0.299 * red + 0.587 * green + 0.114 * blue < 150
  ink = (255, 255, 255) if dark else (0, 0, 0)
  middle = ((spot[0] + spot[2]) / 2, (spot[1] + spot[3]) / 2)
  try:
    pen.text(middle, text, ink, font, anchor='mm')
  except ValueError:  # Pillow's bitmap font has no anchors
    pen.text((spot[0] + pad, spot[1] + pad), text, ink, font)
  return missing


def _shorten(pen, text, font, width) -> str:
  """The longest beginning of `text` that fits, `..` after it if cut."""
  text = text[:200]
  for end in range(len(text), 1, -1):
    shown = text if end == len(text) else f'{text[: end - 1]}..'
    if pen.textlength(shown, font) <= width:
      return shown
  return text[:1]


def _overlap(one, other) -> bool:
  return (
    one[0] < other[2]
    and other[0] < one[2]
    and one[1] < other[3]
    and other[1] < one[3]
  )
