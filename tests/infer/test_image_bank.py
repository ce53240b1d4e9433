"""The same picture is encoded once, and no other passes for it."""

import ml_dtypes
import numpy as np
import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.infer.image_bank import ImageBank, image_key

RED = np.full((4, 4, 3), 7, np.uint8)


class Encoder:
  """Stands in for an engine: features are a list of what was encoded."""

  images = 3

  def init_bank(self):
    return [None] * self.images

  def encode(self, bank, pixels, places):
    if pixels is None:
      raise DataError('no pixels')
    for place, image in zip(places, pixels, strict=True):
      bank[place] = image
    return bank


@pytest.fixture
def bank():
  return ImageBank(Encoder())


def hold(bank, name):
  """Holds an image that is its own name; returns (place, encoded now)."""
  place = bank.find(name)
  if place is not None:
    return place, False
  bank.encode([name], [name])
  return bank.find(name), True


def test_found_again_by_its_key(bank):
  first, encoded = hold(bank, b'a')
  assert encoded
  assert hold(bank, b'a') == (first, False)
  second, encoded = hold(bank, b'b')
  assert encoded
  assert second != first
  assert bank.features[first] == b'a'
  assert bank.features[second] == b'b'


def test_what_was_not_used_for_longest_makes_room(bank):
  for name in (b'a', b'b', b'c', b'a'):
    hold(bank, name)
    bank.release(name)
  assert hold(bank, b'd')[1]
  assert not hold(bank, b'a')[1]
  assert not hold(bank, b'c')[1]
  bank.release(b'd')
  assert hold(bank, b'b')[1]


def test_what_is_held_stays(bank):
  hold(bank, b'a')
  hold(bank, b'a')
  for number in range(20):
    name = bytes([number])
    hold(bank, name)
    bank.release(name)
  # Held twice, released once.
  bank.release(b'a')
  for number in range(20):
    name = bytes([number])
    hold(bank, name)
    bank.release(name)
  assert not hold(bank, b'a')[1]


def test_an_image_that_fails_takes_no_place(bank):
  for number in range(10):
    with pytest.raises(DataError):
      bank.encode([bytes([number])], None)
  for name in (b'a', b'b', b'c'):
    hold(bank, name)
  assert sorted(bank.features) == [b'a', b'b', b'c']
  for name in (b'a', b'b', b'c'):
    bank.release(name)
  # One that fails where all places are taken costs at most what it evicted.
  for number in range(10):
    with pytest.raises(DataError):
      bank.encode([bytes([number])], None)
  assert not hold(bank, b'b')[1]
  assert not hold(bank, b'c')[1]


def test_several_are_encoded_at_once(bank):
  hold(bank, b'a')
  bank.encode([b'b', b'c'], [b'b', b'c'])
  assert b'b' in bank
  assert [bank.features[bank.find(x)] for x in (b'c', b'b')] == [b'c', b'b']
  bank.release(b'a')
  bank.release(b'b')
  bank.encode([b'd', b'e'], [b'd', b'e'])
  assert b'a' not in bank
  assert b'b' not in bank
  assert not hold(bank, b'c')[1]


def test_cleared_it_knows_nothing(bank):
  hold(bank, b'a')
  bank.release(b'a')
  bank.clear()
  assert bank.features == [None] * 3
  assert all(hold(bank, name)[1] for name in (b'a', b'b', b'c'))


def test_keys_tell_images_apart():
  turned = RED.copy()
  turned[0, 0, 0] = 8
  others = [
    turned,
    RED.reshape(2, 8, 3),
    RED.view(np.int8),
    RED.astype(np.float32),
    RED.astype(np.float16),
    RED.astype(ml_dtypes.bfloat16),
  ]
  keys = {image_key(RED), *map(image_key, others)}
  keys |= {image_key(RED, salt) for salt in (b'x', b'y', b'(4, 4, 3)')}
  assert len(keys) == 1 + len(others) + 3
  assert image_key(RED) == image_key(RED.copy())
  # However the array lies in memory.
  assert image_key(np.asfortranarray(RED)) == image_key(RED)
  assert image_key(np.repeat(RED, 2, axis=1)[:, ::2]) == image_key(RED)
