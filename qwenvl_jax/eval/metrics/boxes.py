"""Overlap of boxes."""

from collections.abc import Sequence

from qwenvl_jax.text import grounding

# Of precision@1 in the paper's grounding benchmarks.
THRESHOLD = 0.5


def iou(first: Sequence[float], second: Sequence[float]) -> float:
  """Intersection over union of two boxes x1, y1, x2, y2; 0 if one is empty.

  >>> iou((0, 0, 2, 2), (1, 0, 3, 2))
  0.3333333333333333
  """
  width = min(first[2], second[2]) - max(first[0], second[0])
  height = min(first[3], second[3]) - max(first[1], second[1])
  if width <= 0 or height <= 0:
    return 0.0
  shared = width * height
  union = _area(first) + _area(second) - shared
  return shared / union


def _area(box) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])


def grounding_hit(
  answer: str,
  box: Sequence[float],
  width: float,
  height: float,
  scale: int = 999,
) -> float:
  """Returns 1 if the first box of an answer overlaps the true one enough.

  Precision@1 at an intersection over union of 0.5. The first `(x1,y1),(x2,y2)`
  counts, with tags or without, closed or not; an answer without one is a miss.

  Args:
    box: the true one, x1, y1, x2, y2 in pixels.
    scale: units per side of the answer; the release divides by 999.

  >>> grounding_hit('(0,0),(999,500)', (0, 0, 640, 240), 640, 480)
  1.0
  """
  return float(grounding_iou(answer, box, width, height, scale) >= THRESHOLD)


def grounding_iou(
  answer: str,
  box: Sequence[float],
  width: float,
  height: float,
  scale: int = 999,
) -> float:
  """Returns the overlap that `grounding_hit` compares; 0 without a box."""
  found = grounding.first_box(answer)
  if found is None:
    return 0.0
  return iou(grounding.to_pixels(found, (width, height), scale), box)
