"""Prompts on their way into a prefix, piece by piece."""

from collections.abc import Sequence

import jax
import numpy as np

from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.image_bank import ImageBank, image_key
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.state import Prefix, Scores


class Reading:
  """One prompt, or several short ones: what is still to be encoded and read.

  Attributes:
    prefix: what was read so far, None before the first piece.
    finished: whether everything was read.
  """

  def __init__(
    self,
    engine: Engine,
    bank: ImageBank,
    requests: Sequence[Request],
    top: int | None = None,
  ):
    """Begins to read.

    Args:
      bank: of image features; those of the prompts are held until `release`.
      top: to score the tokens of one prompt, how many of the most likely ones
        to tell beside each; None for no scores.
    """
    self._engine, self._bank = engine, bank
    self._prompts = [request.tokens for request in requests]
    self._adapters = [request.adapter for request in requests]
    self._rows = [
      np.full(len(tokens), -1, np.int32) for tokens in self._prompts
    ]
    self._images = [
      (image_key(pixels, request.salt), pixels, rows[start:])
      for request, rows in zip(requests, self._rows, strict=True)
      for pixels, start in zip(
        request.images, request.image_starts, strict=True
      )
    ]
    self._pieces = engine.pieces(max(map(len, self._prompts)))
    self._held: list[bytes] = []
    self._top = top
    self._scores: list[tuple[int, Scores]] = []
    self.prefix: Prefix | None = None

  @property
  def finished(self) -> bool:
    return not self._pieces

  def step(self) -> int:
    """Encodes images, or reads one piece; returns its cost in tokens."""
    cost = self._find_images()
    if cost:
      return cost
    engine = self._engine
    if self.prefix is None:
      lengths = [len(tokens) for tokens in self._prompts]
      self.prefix = engine.start(lengths, self._adapters)
    piece = self._pieces.pop(0)
    arguments = (
      *(self.prefix, self._bank.features, self._prompts, self._rows, piece),
    )
    if self._top is None:
      self.prefix = engine.prefill(*arguments)
    else:
      self.prefix, scores = engine.score(*arguments, self._top)
      self._scores.append((piece.stop - piece.start, scores))
    return len(self._prompts) * piece.length

  def _find_images(self) -> int:
    """Puts images in their places until some must be encoded.

    Returns:
      What encoding them cost; 0 if all have their places.
    """
    queries = self._engine.queries
    while self._images:
      key, _, rows = self._images[0]
      place = self._bank.find(key)
      if place is None:
        return self._encode()
      self._held.append(key)
      rows[:queries] = np.arange(queries) + place * queries
      self._images.pop(0)
    return 0

  def _encode(self) -> int:
    """Encodes the next images: one, or as many as there are rows to read."""
    first = self._images[0][1]
    alike = {
      key: pixels
      for key, pixels, _ in self._images
      if (pixels.shape, pixels.dtype) == (first.shape, first.dtype)
      and key not in self._bank
    }
    count = (
      self._engine.read_rows if len(alike) >= self._engine.read_rows else 1
    )
    keys = list(alike)[:count]
    self._bank.encode(keys, np.stack([alike[key] for key in keys]))
    patch = self._engine.config.vision.patch_size
    return count * (first.shape[0] // patch) * (first.shape[1] // patch)

  def scores(self) -> Scores:
    """What the model says of each token after the first, as NumPy arrays."""
    parts = [
      Scores(*(x[:count] for x in jax.device_get(scores)))
      for count, scores in self._scores
    ]
    return Scores(*(np.concatenate(x)[:-1] for x in zip(*parts)))

  def release(self) -> None:
    """Lets go of images and prefix."""
    for key in self._held:
      self._bank.release(key)
    self._held, self.prefix = [], None
