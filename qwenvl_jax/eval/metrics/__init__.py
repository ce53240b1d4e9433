"""Metrics in plain Python and NumPy, equal to the official scorers.

One answer at a time, as a fraction: `vqa_accuracy`, `relaxed_accuracy`,
`exact_match`, `anls`, `grounding_hit`; of a corpus: `caption_scores`.
"""

from qwenvl_jax.eval.metrics.answers import (
  anls,
  exact_match,
  relaxed_accuracy,
)
from qwenvl_jax.eval.metrics.boxes import grounding_hit, iou
from qwenvl_jax.eval.metrics.captions import caption_scores
from qwenvl_jax.eval.metrics.vqa import vqa_accuracy

__all__ = [
  'anls',
  'caption_scores',
  'exact_match',
  'grounding_hit',
  'iou',
  'relaxed_accuracy',
  'vqa_accuracy',
]
