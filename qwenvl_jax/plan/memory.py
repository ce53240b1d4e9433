"""What a training step takes by hand count: too little, and at least this.

Used to leave out what cannot fit and to begin with what promises most; figures
that are reported come from the compiler.
"""

import dataclasses
import math
from typing import Any

from qwenvl_jax.plan.model_flops import model_flops, work_of
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.train.loop import TrainConfig
from qwenvl_jax.train.optimizer import flatten, split

# By remat policy of `QwenVLConfig`, from the most that a layer keeps to the
# least: what it keeps beside its input, at least, in widths of the model and of
# the MLP's hidden units (a vision layer has no gate); the work of a step, in
# units of one that recomputes nothing.
POLICIES = {
  'none': (6, 3, 1.0),
  'products': (5, 2, 1.02),
  'dots': (5, 2, 1.05),
  'qkv_attention_residual_up': (5, 1, 1.12),
  'qkv_attention_up': (4, 1, 1.14),
  'qkv_attention_residual': (5, 0, 1.2),
  'qkv_attention': (4, 0, 1.22),
  'attention': (1, 0, 1.3),
  'full': (0, 0, 4 / 3),
}
# What large products reach of the peak, and what of the communication can not
# be hidden behind them.
_PRODUCTS = 0.65
_EXPOSED = 0.3


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a configuration's parameters; a mesh does not change them.

  Attributes:
    trained: number of parameters, as `frozen`.
    shapes: by path.
  """

  trained: int
  frozen: int
  shapes: dict[str, tuple[int, ...]]
  trained_paths: frozenset[str]

  @property
  def trains_vision(self) -> bool:
    """Whether vision layers have a backward pass."""
    return any(path.startswith('vision/') for path in self.trained_paths)

  def count(self, part: str) -> int:
    """Number of parameters of 'vision', 'adapter' or 'decoder'."""
    return sum(
      math.prod(shape)
      for path, shape in self.shapes.items()
      if path.startswith(f'{part}/')
    )

  @classmethod
  def of(cls, config: TrainConfig, params: Any) -> 'Sizes':
    """From `abstract_params`."""
    trained, frozen = (flatten(p) for p in split(params, config.optimizer))
    return cls(
      sum(leaf.size for leaf in trained.values()),
      sum(leaf.size for leaf in frozen.values()),
      {path: leaf.shape for path, leaf in flatten(params).items()},
      frozenset(trained),
    )


def lower_bound(config: TrainConfig, sizes: Sizes, chips: int) -> float:
  """Bytes a chip that a training step takes in any case.

  State, gradient, what the layers that have a backward pass keep for it, and
  one copy of the logits: all there when the backward pass begins.
  """
  model, data = config.objective.config, config.data
  copies, fsdp, tensor = config.mesh.sizes(chips)
  compute, master = model.dtype.itemsize, model.param_dtype.itemsize
  # Parameter and two moments; the gradient, summed up if in microbatches.
  summed = master if config.accumulation > 1 else compute
  state = sizes.trained * (3 * master + summed) + sizes.frozen * compute
  widths, hidden, _ = POLICIES[model.remat]
  decoder, vision = model.decoder, model.vision
  inner = widths * decoder.dim + hidden * decoder.mlp_dim
  kept = (
    decoder.layers * data.sequence_length * (decoder.dim + inner / tensor)
    + data.sequence_length * decoder.vocab_size / tensor
  )
  if sizes.trains_vision:
    widths, hidden, _ = POLICIES[model.vision_remat or model.remat]
    inner = widths * vision.width + min(hidden, 1) * vision.mlp_dim
    kept += vision.layers * _patches(config) * (vision.width + inner / tensor)
  rows = data.batch_size / config.accumulation / (copies * fsdp)
  return state / (fsdp * tensor) + rows * kept * compute


def heuristic_step_time(
  config: TrainConfig, sizes: Sizes, topology: Topology
) -> float:
  """Seconds a step might take: an order of candidates, not an estimate."""
  model, chip = config.objective.config, topology.chip
  copies, fsdp, tensor = config.mesh.sizes(topology.chips)
  needed = model_flops(
    model, sizes.shapes, sizes.trained_paths, work_of(config.data)
  )
  # Of the work, by how much each part takes.
  vision = sizes.count('vision') * _patches(config)
  decoder = sizes.count('decoder') * config.data.sequence_length
  _, _, again = POLICIES[model.remat]
  _, _, seen = POLICIES[model.vision_remat or model.remat]
  seen = seen if sizes.trains_vision else 1.0
  factor = (again * decoder + seen * vision) / (decoder + vision)
  computing = factor * needed / topology.chips / chip.peak_flops / _PRODUCTS
  # Gathered forward and backward, and the gradient scattered.
  sent = 2 * (sizes.trained + sizes.frozen) + sizes.trained
  sent *= model.dtype.itemsize / tensor
  rows = config.data.batch_size / config.accumulation / (copies * fsdp)
  if tensor > 1:
    # Four sums of a layer's activations, forward and backward.
    tokens = rows * config.data.sequence_length
    width = model.decoder.dim * model.dtype.itemsize
    sent += 8 * tokens * model.decoder.layers * width
  sending = config.accumulation * sent / chip.collective_bandwidth
  longer, shorter = max(computing, sending), min(computing, sending)
  return longer + _EXPOSED * shorter


def _patches(config: TrainConfig) -> int:
  """Of a row."""
  data = config.data
  side = data.image_size // config.objective.config.vision.patch_size
  return data.image_slots * side**2
