"""The batch contract: what data, training, evaluation and inference exchange.

Every array has a fixed shape, so that one compiled program serves every batch:
B rows of T tokens, and I image slots a row. A row may hold several samples
(segments), a sample several images, and a row may leave image slots unused.
"""

import dataclasses

import jax
import numpy as np

# `image_starts` of a slot that holds no image.
NO_IMAGE = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of tokens with the images that belong to them.

  Attributes:
    tokens: [B,T] int32. Every image is a span `<img>`, Q arbitrary ids (the
      release writes the image's path into them), `</img>`; the Q ids stand
      where the Q image features go.
    targets: [B,T] int32; `targets[b, t]` is what position t should predict:
      the next token of the same segment. Any id where the weight is 0.
    loss_weights: [B,T] float32, aligned with `targets`; 0 = no loss.
    positions: [B,T] int32, the rotary position, counted from 0 within each
      segment (a branch continues the count of its prefix).
    segment_ids: [B,T] int32. Attention stays within a segment; 0 is padding.
    branch_ids: [B,T] int32. 0 is a segment's prefix, which all later tokens of
      the segment see. Tokens of branch k > 0 are seen by branch k only, so that
      several questions about one picture share its tokens and each still gets
      exactly what it would get alone.
    pixels: [B,I,R,R,3], uint8 as decoded (normalized on the device) or float,
      already normalized. Unused slots hold anything.
    image_starts: [B,I] int32, the index in the row of the first of the Q ids
      that image i's features replace (one after `<img>`); `NO_IMAGE` for an
      unused slot.
  """

  tokens: jax.Array
  targets: jax.Array
  loss_weights: jax.Array
  positions: jax.Array
  segment_ids: jax.Array
  branch_ids: jax.Array
  pixels: jax.Array
  image_starts: jax.Array


def text_batch(tokens, mask=None) -> Batch:
  """One plain sample a row, no images and no loss.

  Args:
    tokens: [B,T] int.
    mask: [B,T] bool, true for real tokens; None if there is no padding. Padding
      may stand on either side: positions count real tokens only.

  Returns:
    A NumPy-backed batch with zero image slots.
  """
  tokens = np.asarray(tokens, np.int32)
  mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
  rows, _ = tokens.shape
  return Batch(
    tokens=tokens,
    targets=np.zeros_like(tokens),
    loss_weights=np.zeros(tokens.shape, np.float32),
    positions=np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32),
    segment_ids=mask.astype(np.int32),
    branch_ids=np.zeros_like(tokens),
    pixels=np.zeros((rows, 0, 1, 1, 3), np.uint8),
    image_starts=np.zeros((rows, 0), np.int32),
  )
