"""Image features on the device, found again by what the image shows."""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.infer.engine import Engine


class ImageBank:
  """Features of the images that were used last.

  An image is known by a hash of its pixels with their shape and dtype, and by
  its request's salt. Features in use are held; of the others, the one that was
  not used for longest makes room.

  Attributes:
    features: [F,Q,D] on the device.
  """

  def __init__(self, engine: Engine):
    self._engine = engine
    self.clear()

  def clear(self) -> None:
    """Forgets all images."""
    self.features = self._engine.init_bank()
    self._places: collections.OrderedDict[bytes, int] = (
      collections.OrderedDict()
    )
    self._free = list(range(self._engine.images))
    self._holders = collections.Counter()

  def __contains__(self, key: bytes) -> bool:
    return key in self._places

  def find(self, key: bytes) -> int | None:
    """Holds the features of an image, if they are there.

    Returns:
      Their place, or None.
    """
    place = self._places.get(key)
    if place is not None:
      self._places.move_to_end(key)
      self._holders[key] += 1
    return place

  def encode(self, keys: Sequence[bytes], pixels: np.ndarray) -> None:
    """Computes the features of images, for `find` to hold.

    Args:
      keys: from `image_key`, of images that are not there.
      pixels: [E,R,R,3], one a key.
    """
    while len(self._free) < len(keys):
      self._free.append(self._evict())
    places = self._free[-len(keys) :]
    # Where this fails, the places stay free.
    self.features = self._engine.encode(self.features, pixels, places)
    del self._free[-len(keys) :]
    self._places |= zip(keys, places, strict=True)

  def release(self, key: bytes) -> None:
    """Lets go of the features of an image."""
    self._holders[key] -= 1
    if not self._holders[key]:
      del self._holders[key]

  def _evict(self) -> int:
    key = next(k for k in self._places if k not in self._holders)
    return self._places.pop(key)


def image_key(pixels: np.ndarray, salt: bytes = b'') -> bytes:
  """Hashes an image: sha256 of salt, shape, dtype and pixels.

  Args:
    pixels: [H, W, 3] of any dtype, normalized.
    salt: what separates those who must not share features.
  """
  head = f'{len(salt)} {pixels.shape} {pixels.dtype} '.encode()
  digest = hashlib.sha256(head + salt)
  # As bytes, for bfloat16 has no buffer that other programs know.
  digest.update(np.ascontiguousarray(pixels).view(np.uint8))
  return digest.digest()
