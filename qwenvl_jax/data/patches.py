"""Scenes as a vision transformer sees them: what each patch belongs to."""

import numpy as np

from qwenvl_jax.data import things
from qwenvl_jax.data.records import Scene

# Labels of patches: things, colours of the background, words.
_COLOURS = len(things.THINGS)
_WORDS = _COLOURS + len(things.COLOURS)
_WORD_LABELS = {
  word: _WORDS + number for number, (word, _) in enumerate(things.WORDS)
}
LABELS = _WORDS + len(things.WORDS)


def patch_targets(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
  """What is in each patch, and where all of that is.

  A patch belongs to the thing or word whose box covers most of it, if that is
  at least half; else to the background. What covers half of no patch still gets
  the one it covers most of.

  Args:
    scene: the scene.
    grid: patches on a side.

  Returns:
    [grid,grid] int32, below `LABELS`: the ids of things, after them those of
    colours and of words; and [grid,grid,4] float32: the box of the thing or
    word as shares of the side, 0 for the background.
  """
  labels = np.full((grid, grid), _COLOURS + scene.colour, np.int32)
  boxes = np.zeros((grid, grid, 4), np.float32)
  best = np.zeros((grid, grid))
  edges = np.arange(grid + 1) * (scene.side / grid)
  found = [(x.thing, x.box) for x in scene.objects]
  found += [(_WORD_LABELS[x.word], _bounds(x.quad)) for x in scene.words]
  for label, box in found:
    x1, y1, x2, y2 = box
    across = np.minimum(edges[1:], x2) - np.maximum(edges[:-1], x1)
    down = np.minimum(edges[1:], y2) - np.maximum(edges[:-1], y1)
    share = np.maximum(down, 0)[:, None] * np.maximum(across, 0)
    share /= (scene.side / grid) ** 2
    wins = (share >= min(0.5, share.max())) & (share > best)
    labels[wins] = label
    boxes[wins] = np.array(box, np.float32) / scene.side
    best[wins] = share[wins]
  return labels, boxes


def _bounds(quad) -> tuple[float, ...]:
  xs, ys = zip(*quad, strict=True)
  return min(xs), min(ys), max(xs), max(ys)
