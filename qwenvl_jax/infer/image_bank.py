"""Image features on the device, found again by what the image shows."""

import collections
import hashlib

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

  def find(self, key: bytes) -> int | None:
    """Holds the features of an image, if they are there.

    Args:
      key: from `image_key`.

    Returns:
      Their place, or None.
    """
    place = self._places.get(key)
    if place is not None:
      self._places.move_to_end(key)
      self._holders[key] += 1
    return place

  def encode(self, key: bytes, pixels: np.ndarray) -> int:
    """Computes the features of an image and holds them.

    Args:
      key: from `image_key`.
      pixels: [R,R,3].

    Returns:
      Their place.
    """
    if not self._free:
      self._free.append(self._evict())
    place = self._free[-1]
    # Where this fails, the place stays free.
    self.features = self._engine.encode(self.features, pixels, place)
    self._places[key] = self._free.pop()
    self._holders[key] += 1
    return place

  def release(self, key: bytes) -> None:
    """Lets go of the features of an image."""
    self._holders[key] -= 1
    if not self._holders[key]:
      del self._holders[key]

  def _evict(self) -> int:
    key = next(k for k in self._places if k not in self._holders)
    return self._places.pop(key)


def image_key(pixels: np.ndarray, salt: bytes = b'') -> bytes:
  """Hashes an image: sha256 of salt, shape, dtype and pixels."""
  head = f'{len(salt)} {pixels.shape} {pixels.dtype} '.encode()
  digest = hashlib.sha256(head + salt)
  # As bytes, for bfloat16 has no buffer that other programs know.
  digest.update(np.ascontiguousarray(pixels).view(np.uint8))
  return digest.digest()
