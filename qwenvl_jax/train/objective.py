"""What a run learns: the model with its loss, behind one small protocol."""

import dataclasses
from typing import Any, Protocol

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qwenvl_jax.batch import Batch, text_batch
from qwenvl_jax.errors import DataError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.layers import default_init
from qwenvl_jax.model.loss import next_token_loss
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.model.vision import VisionTransformer

# Patches with this label carry no loss in `PatchObjects`.
NO_LABEL = -1


class Objective(Protocol):
  """What the trainer needs to know of a model and its loss.

  Attributes:
    config: of the model; the trainer reads the dtypes of the computation and
      of the trained parameters from it and saves it beside the checkpoints.
  """

  config: QwenVLConfig

  def init(self, key: jax.Array) -> Any:
    """Random parameters: a nested dict; leaves may be logically partitioned."""

  def check(self, batch: dict[str, np.ndarray]) -> None:
    """Looks at a batch on the host, before it is sent to the devices.

    Raises:
      DataError: the loss cannot be computed of it.
    """

  def loss(
    self,
    params: Any,
    batch: dict[str, jax.Array],
    key: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Sums over the rows of (a microbatch of) the batch.

    Args:
      params: the whole tree.
      batch: the rows.
      key: of what is left out at random (dropout); None for nothing.

    Returns:
      (sum of the loss, sum of the weights, further sums). Of the further sums
      `tokens` and `images` count what was processed; any other is reported
      divided by the weight.
    """


@dataclasses.dataclass(frozen=True)
class NextToken:
  """The Qwen-VL objective: the next token, of every stage.

  Batches hold the fields of `Batch`.

  Attributes:
    config: of the model.
    branches: whether rows may have branches (`Batch.branch_ids`). Without,
      attention may take the kernel that keeps segments apart and no more;
      `check` sees to it that there are none.
  """

  config: QwenVLConfig
  branches: bool | int = True

  def check(self, batch: dict[str, np.ndarray]) -> None:
    """Looks at a batch on the host, before it is sent to the devices.

    Raises:
      DataError: rows have branches that the model has been told not to expect.
    """
    if not self.branches and np.any(batch['branch_ids']):
      row = int(np.argmax(np.any(batch['branch_ids'], axis=1)))
      raise DataError(
        f'row {row} of the batch has branches (questions that share a '
        'picture), but NextToken.branches is 0: set BRANCHES to the number '
        'that the formats have, or to 0 for all'
      )

  def init(self, key: jax.Array) -> Any:
    batch = text_batch(np.zeros((1, 1), np.int32))
    return QwenVL(self.config).init(key, batch)['params']

  def loss(self, params, batch, key=None):
    batch = Batch(**batch)
    rngs = None if key is None else {'dropout': key}
    if not self.branches:
      batch = dataclasses.replace(batch, branch_ids=None)
    logits = QwenVL(self.config).apply({'params': params}, batch, rngs=rngs)
    loss, weight = next_token_loss(logits, batch.targets, batch.loss_weights)
    counts = {
      'tokens': jnp.sum(batch.segment_ids > 0),
      'images': jnp.sum(batch.image_starts >= 0),
    }
    return loss, weight, counts


@dataclasses.dataclass(frozen=True)
class PatchObjects:
  """A stand-in for CLIP pre-training: what is in each patch, and how far.

  A vision transformer with a linear head that names what a patch shows and
  says on which lines of a grid the whole of it begins and ends. Its tree has
  `vision` exactly as Qwen-VL has it, so that `InitFrom(vision=...)` takes it
  over, and `head`.

  Batches hold `pixels` [B,R,R,3] (uint8, or float normalized), `patch_labels`
  [B,G,G] int32 with `NO_LABEL` for no loss, and `patch_boxes` [B,G,G,4]
  float32, x1, y1, x2, y2 as shares of the side, all 0 where there is nothing
  to delimit, as `VisionPipeline` makes them; G = R / patch size.

  Attributes:
    config: of the model whose vision transformer this is.
    classes: number of labels.
    lines: on a side, evenly spread from 0 to 1; each of a box's four
      coordinates is classified as the nearest one.
    box_weight: of the boxes' cross entropy (mean of the four coordinates)
      against the names'.
  """

  config: QwenVLConfig
  classes: int
  lines: int
  box_weight: float = 2.0

  def _model(self) -> nn.Module:
    return _PatchHead(self.config, self.classes + 4 * self.lines)

  def check(self, batch: dict[str, np.ndarray]) -> None:
    found = int(batch['patch_labels'].max())
    if found >= self.classes:
      raise DataError(
        f'a patch has label {found}, and PatchObjects.classes={self.classes} '
        'ends before it: raise classes (data.patches.LABELS is enough)'
      )

  def init(self, key: jax.Array) -> Any:
    side = self.config.vision.image_size
    pixels = jnp.zeros((1, side, side, 3), jnp.uint8)
    return self._model().init(key, pixels)['params']

  def loss(self, params, batch, key=None):
    del key
    outputs = self._model().apply({'params': params}, batch['pixels'])
    logits, coordinates = jnp.split(
      outputs.astype(jnp.float32), [self.classes], axis=-1
    )
    labels = einops.rearrange(batch['patch_labels'], 'b h w -> b (h w)')
    weights = (labels != NO_LABEL).astype(jnp.float32)
    targets = jnp.maximum(labels, 0)
    loss, weight = next_token_loss(logits, targets, weights)
    correct = jnp.sum((jnp.argmax(logits, -1) == targets) * weights)
    boxes = einops.rearrange(batch['patch_boxes'], 'b h w c -> b (h w) c')
    delimited = jnp.any(boxes > 0, axis=-1, keepdims=True)
    coordinates = einops.rearrange(
      coordinates, 'b p (c l) -> b p c l', l=self.lines
    )
    wanted = jnp.round(boxes * (self.lines - 1)).astype(jnp.int32)
    box_loss, _ = next_token_loss(
      coordinates, wanted, jnp.broadcast_to(delimited / 4, boxes.shape)
    )
    exact = jnp.all(jnp.argmax(coordinates, -1) == wanted, axis=-1)
    return (
      loss + self.box_weight * box_loss,
      weight,
      {
        'accuracy': correct,
        # Of all patches: where there is nothing to delimit counts as exact.
        'exact_boxes': jnp.sum((exact | ~delimited[..., 0]) * weights),
        'images': jnp.asarray(labels.shape[0], jnp.int32),
      },
    )


class _PatchHead(nn.Module):
  config: QwenVLConfig
  outputs: int

  @nn.compact
  def __call__(self, pixels):
    c = self.config
    x = VisionTransformer(
      c.vision,
      c.dtype,
      c.param_dtype,
      c.vision_remat or c.remat,
      c.unroll,
      c.attention,
      name='vision',
    )(pixels)
    head = self.param(
      'head', default_init, (c.vision.width, self.outputs), c.param_dtype
    )
    return jnp.einsum('BPD,DC->BPC', x, head.astype(c.dtype))
