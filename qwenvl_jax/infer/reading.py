"""A prompt on its way into a prefix, piece by piece."""

import jax
import numpy as np

from qwenvl_jax.infer.engine import Engine
from qwenvl_jax.infer.image_bank import ImageBank, image_key
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.state import Prefix, Scores


class Reading:
  """One prompt: which images are still to be encoded, which pieces to be read.

  Attributes:
    prefix: what was read so far, None before the first piece.
    finished: whether everything was read.
  """

  def __init__(
    self,
    engine: Engine,
    bank: ImageBank,
    request: Request,
    top: int | None = None,
  ):
    """Begins to read.

    Args:
      engine: reads the prompt.
      bank: of image features; those of the prompt are held until `release`.
      request: has the prompt.
      top: to score the prompt's tokens, how many of the most likely ones to
        tell beside each; None for no scores.
    """
    self._engine, self._bank, self._request = engine, bank, request
    self._images = [
      (image_key(pixels, request.salt), pixels, start)
      for pixels, start in zip(
        request.images, request.image_starts, strict=True
      )
    ]
    self._pieces = engine.pieces(len(request.tokens))
    self._rows = np.full(len(request.tokens), -1, np.int32)
    self._held: list[bytes] = []
    self._top = top
    self._scores: list[tuple[int, Scores]] = []
    self.prefix: Prefix | None = None

  @property
  def finished(self) -> bool:
    return not self._pieces

  def step(self) -> int:
    """Encodes one image, or reads one piece; returns its cost in tokens."""
    while self._images:
      cost = self._look_up(*self._images.pop(0))
      if cost:
        return cost
    engine, request = self._engine, self._request
    if self.prefix is None:
      self.prefix = engine.start(len(request.tokens))
    piece = self._pieces.pop(0)
    arguments = (
      *(self.prefix, self._bank.features, request.tokens, self._rows, piece),
    )
    if self._top is None:
      self.prefix = engine.prefill(*arguments)
    else:
      self.prefix, scores = engine.score(*arguments, self._top)
      self._scores.append((piece.stop - piece.start, scores))
    return piece.length

  def _look_up(self, key: bytes, pixels: np.ndarray, start: int) -> int:
    """Puts an image in its place; returns the cost of encoding it."""
    cost, place = 0, self._bank.find(key)
    if place is None:
      place = self._bank.encode(key, pixels)
      patch = self._engine.config.vision.patch_size
      cost = pixels.shape[0] // patch * (pixels.shape[1] // patch)
    self._held.append(key)
    queries = self._engine.queries
    self._rows[start : start + queries] = np.arange(queries) + place * queries
    return cost

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
