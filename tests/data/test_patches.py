import numpy as np

from qwenvl_jax.data import patches, records, things


def test_labels_follow_the_boxes(two_apples_and_a_cat):
  red = len(things.THINGS)
  labels, boxes = patches.patch_targets(two_apples_and_a_cat, 8)
  expected = np.full((8, 8), red)
  expected[0, 0] = (
    red + len(things.COLOURS) + things.WORDS.index(('open', 'en'))
  )
  expected[1:3, 4:7] = 1
  expected[4:6, 0:3] = 0
  expected[4, 5:7] = 0
  expected[5:7, 4:7] = 0
  np.testing.assert_array_equal(labels, expected)
  side = two_apples_and_a_cat.side
  for thing in two_apples_and_a_cat.objects:
    shares = np.array(thing.box, np.float32) / side
    assert (boxes == shares).all(-1).any()
  np.testing.assert_allclose(boxes[0, 0], np.array([1, 2, 20, 20]) / side)
  assert (boxes.any(-1) == (labels != red)).all()
  assert labels.max() < patches.LABELS


def test_half_a_cell_counts_and_the_larger_share_wins():
  scene = records.scene(
    'x',
    b'',
    40,
    # 60% and 40% of the second cell, all of the first and third.
    [records.Object(0, (0, 0, 16, 10)), records.Object(1, (16, 0, 30, 10))],
    colour=1,
  )
  labels, _ = patches.patch_targets(scene, 4)
  assert labels[0].tolist() == [0, 0, 1, len(things.THINGS) + 1]


def test_a_thing_too_small_for_any_cell_gets_one():
  scene = records.scene(
    'x', b'', 40, [records.Object(7, (11, 11, 14, 14))], colour=1
  )
  labels, _ = patches.patch_targets(scene, 4)
  assert np.argwhere(labels == 7).tolist() == [[1, 1]]
