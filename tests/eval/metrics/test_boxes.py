import json
from pathlib import Path

import pytest

from qwenvl_jax.eval.metrics.boxes import THRESHOLD, iou
from qwenvl_jax.text.grounding import first_box

GOLDEN = Path(__file__).parents[2] / 'goldens' / 'metrics.json'


def test_iou():
  assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
  assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
  assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0
  assert iou((3, 3, 1, 1), (0, 0, 4, 4)) == 0


def test_grounding_as_the_release_scores_it():
  items = json.loads(GOLDEN.read_text())['grounding']['items']
  for item in items:
    height, width = item['hw']
    box = first_box('<box>' + item['answer'])
    if box is None:
      assert not item['correct']
      continue
    # The release's script divides by 999.
    scale = (width / 999, height / 999) * 2
    pixels = [value * factor for value, factor in zip(box, scale, strict=True)]
    overlap = iou(pixels, item['gt_bbox'])
    assert overlap == pytest.approx(item['iou'], abs=1e-6)
    assert (overlap >= THRESHOLD) == item['correct']
  assert len(items) > 5
