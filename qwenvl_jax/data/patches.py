"""Scenes as a vision transformer sees them: what each patch belongs to."""

import numpy as np

from qwenvl_jax.data import things
from qwenvl_jax.data.records import Scene


def patch_targets(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
  """What is in each patch, and where all of that is.

  A patch belongs to the thing whose box covers most of it, if that is at least
  half; else to the background. A thing that covers half of no patch still gets
  the one it covers most of.

  Args:
    scene: the scene.
    grid: patches on a side.

  Returns:
    [grid,grid] int32: a thing's class id, or len(THINGS) + the colour's id;
    and [grid,grid,4] float32: the thing's box as shares of the side, 0 for the
    background.
  """
  labels = np.full((grid, grid), len(things.THINGS) + scene.colour, np.int32)
  boxes = np.zeros((grid, grid, 4), np.float32)
  best = np.zeros((grid, grid))
  edges = np.arange(grid + 1) * (scene.side / grid)
  for thing in scene.objects:
    x1, y1, x2, y2 = thing.box
    across = np.minimum(edges[1:], x2) - np.maximum(edges[:-1], x1)
    down = np.minimum(edges[1:], y2) - np.maximum(edges[:-1], y1)
    share = np.maximum(down, 0)[:, None] * np.maximum(across, 0)
    share /= (scene.side / grid) ** 2
    wins = (share >= min(0.5, share.max())) & (share > best)
    labels[wins] = thing.thing
    boxes[wins] = np.array(thing.box, np.float32) / scene.side
    best[wins] = share[wins]
  return labels, boxes
