"""Overlap of boxes."""

from collections.abc import Sequence

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
