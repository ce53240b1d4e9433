"""Scenes seen on a coarse grid: names of places, for parts that train alone.

The same grid serves both stand-ins for pre-trained parts: as words it teaches
a decoder without eyes where things are (`word_map`), as labels it teaches a
vision transformer without language what is where (`patch_labels`).
"""

import numpy as np

from qwenvl_jax.data import things
from qwenvl_jax.data.examples import WordMap
from qwenvl_jax.data.records import Scene


def patch_labels(scene: Scene, grid: int) -> np.ndarray:
  """What is where: a thing's class id, or len(THINGS) + the colour's id.

  A cell belongs to the thing whose box covers most of it, if that is at least
  half; else to the background. A thing that covers half of no cell still gets
  the one it covers most of.

  Args:
    scene: the scene.
    grid: cells on a side.

  Returns:
    [grid,grid] int32, indices of `things.patch_name`.
  """
  labels = np.full((grid, grid), len(things.THINGS) + scene.colour, np.int32)
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
    best[wins] = share[wins]
  return labels


def word_map(scene: Scene, grid: int, language: str) -> WordMap:
  """The picture in words, one for each cell, in raster order.

  >>> word_map(scene, 2, 'en').words
  (' red', ' red', ' cat', ' red')
  """
  labels = patch_labels(scene, grid).reshape(-1).tolist()
  return WordMap(tuple(map_word(label, language) for label in labels))


def map_word(label: int, language: str) -> str:
  """The word of a cell: one token in the Qwen vocabulary."""
  # With the space before it: the token that the word is inside a sentence.
  name = things.patch_name(label, language)
  return f' {name}' if language == 'en' else name
