"""Shapes and numerics of the model, one frozen dataclass per part."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model import attention, remat
from qwenvl_jax.model.int4 import PER_WORD
from qwenvl_jax.model.lora import LoraConfig


def _check_sizes(config: Any, but: str = '') -> None:
  """Raises ConfigError where a size, but for one, is below 1."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if type(field.default) is int and field.name != but and value < 1:
      raise ConfigError(
        f'{type(config).__name__}.{field.name}={value}: must be at least 1'
      )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """Vision transformer (OpenCLIP ViT-bigG in the release).

  Attributes:
    image_size: side in pixels that data is resized to by default; the model
      itself takes any multiple of `patch_size`.
    position_grid: side of the learned position table (16: 256 rows).
    window: side in patches of the attention window, which divides the grid;
      None for global attention everywhere (the release). Parameters are the
      same with and without.
    global_every: with a window, every n-th block attends globally (paper,
      appendix E.3: windows of 224 pixels, 16 patches, in 3 of 4 blocks).
  """

  image_size: int = 448
  patch_size: int = 14
  width: int = 1664
  layers: int = 48
  heads: int = 16
  mlp_dim: int = 8192
  position_grid: int = 16
  norm_eps: float = 1e-6
  window: int | None = None
  global_every: int = 4

  def __post_init__(self):
    _check_sizes(self)
    if self.width % self.heads:
      raise ConfigError(
        f'VisionConfig.width={self.width} is not a multiple of '
        f'heads={self.heads}'
      )
    if self.image_size % self.patch_size:
      raise ConfigError(
        f'VisionConfig.image_size={self.image_size} is not a multiple of '
        f'patch_size={self.patch_size}'
      )
    side = self.image_size // self.patch_size
    if self.window is not None and (self.window < 1 or side % self.window):
      raise ConfigError(
        f'VisionConfig.window={self.window} does not divide the grid of '
        f'{side}x{side} patches (image_size / patch_size): take a window that '
        'does, or an image_size that is a multiple of patch_size * window'
      )

  @property
  def head_dim(self) -> int:
    return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Position-aware adapter: `queries` learned queries, one cross-attention.

  Attributes:
    queries: a square number (paper: 256; ablation: 64, 144, 256, 400).
    dim: width of the decoder.
    init: 'random' as in the release, or 'aligned', where query i starts out
      attending to the patches at its own place and passes them on.
  """

  queries: int = 256
  dim: int = 4096
  heads: int = 32
  norm_eps: float = 1e-6
  init: str = 'random'

  def __post_init__(self):
    _check_sizes(self)
    if self.grid**2 != self.queries:
      raise ConfigError(
        f'AdapterConfig.queries={self.queries} is not a square number; '
        'the paper uses 64, 144, 256 or 400'
      )
    if self.dim % self.heads or self.dim % 4:
      raise ConfigError(
        f'AdapterConfig.dim={self.dim} must be a multiple of 4 and of '
        f'heads={self.heads}'
      )
    if self.init not in ('random', 'aligned'):
      raise ConfigError(
        f"AdapterConfig.init={self.init!r} is neither 'random' nor 'aligned'"
      )
    if self.init == 'aligned' and self.heads != 1:
      raise ConfigError(
        f"AdapterConfig.init='aligned' needs heads=1, not {self.heads}: the "
        'sines and cosines of both axes must meet in one head'
      )

  @property
  def grid(self) -> int:
    return int(self.queries**0.5 + 0.5)

  @property
  def head_dim(self) -> int:
    return self.dim // self.heads


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Qwen-7B decoder.

  Attributes:
    mlp_dim: width of gate and up (half of config.json's `intermediate_size`).
    seq_length: length the decoder was pre-trained at; in inference, longer
      rows get dynamic NTK frequencies and LogN query scaling.
    int4_group: not None if the kernels of the blocks are held at 4 bits, for
      inference: so many of their inputs share a scale (128 in the release).
    int4_zero_offset: what is added to the zero points that such kernels store:
      1 as released (GPTQ), 0 in the format gptq_v2.
    int8: whether the kernels of blocks and head are held at 8 bits, for
      inference (`model.int8`).
  """

  vocab_size: int = 151936
  dim: int = 4096
  layers: int = 32
  heads: int = 32
  head_dim: int = 128
  mlp_dim: int = 11008
  norm_eps: float = 1e-6
  rope_base: float = 10000.0
  seq_length: int = 2048
  max_position_embeddings: int = 8192
  dynamic_ntk: bool = True
  logn: bool = True
  int4_group: int | None = None
  int4_zero_offset: int = 1
  int8: bool = False

  def __post_init__(self):
    _check_sizes(self, but='int4_zero_offset')
    group = self.int4_group
    if self.int8 and group is not None:
      raise ConfigError(
        'DecoderConfig.int8 and int4_group: kernels are held at 8 or at 4 bits'
      )
    if self.int4_zero_offset not in (0, 1):
      raise ConfigError(
        f'DecoderConfig.int4_zero_offset={self.int4_zero_offset} is neither 1 '
        '(gptq) nor 0 (gptq_v2)'
      )
    if group is None:
      return
    inputs = (self.dim, self.heads * self.head_dim, self.mlp_dim)
    outputs = (self.dim, self.head_dim, self.mlp_dim)
    if group < 1 or any(n % group for n in inputs) or group % PER_WORD:
      raise ConfigError(
        f'DecoderConfig.int4_group={group} must be a multiple of {PER_WORD} '
        f'that divides the inputs of all kernels: {inputs}'
      )
    if any(n % PER_WORD for n in outputs):
      raise ConfigError(
        f'DecoderConfig.int4_group: {PER_WORD} zero points make a word, so '
        f'outputs of kernels must be multiples of that, not {outputs}'
      )


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
  """The whole model, and how it computes.

  Attributes:
    image_start_id: id of `<img>`; `</img>` and `<imgpad>` follow it.
    dtype: of activations. Norms, softmax, rotary and loss are float32.
    param_dtype: of parameters.
    remat: what a decoder layer keeps for its backward pass, a name in
      `remat.POLICIES`: from 'none', which keeps everything, to 'full', which
      keeps its input only.
    vision_remat: the same of a vision layer; None for that of the decoder.
    attention: 'splash' (a TPU kernel), 'xla', or 'auto', which takes splash
      attention on TPUs where it can.
    unroll: how many layers a step of the scan over them holds. More run faster
      on a CPU (a fifth at the quickstart's size) and compile longer.
    scan_layers: whether the decoder's layers are stacked and scanned, for
      training, or apart with the outputs of their kernels first
      (`model.stacking`), for inference.
    lora: which projections are adapted by low-rank factors; None for none.
  """

  vision: VisionConfig = VisionConfig()
  adapter: AdapterConfig = AdapterConfig()
  decoder: DecoderConfig = DecoderConfig()
  image_start_id: int = 151857
  dtype: Any = jnp.bfloat16
  param_dtype: Any = jnp.float32
  remat: str = 'full'
  vision_remat: str | None = None
  attention: str = 'auto'
  unroll: int = 1
  scan_layers: bool = True
  lora: LoraConfig | None = None

  def __post_init__(self):
    _check_sizes(self)
    for name in ('dtype', 'param_dtype'):
      object.__setattr__(self, name, _float_type(name, getattr(self, name)))
    if self.adapter.dim != self.decoder.dim:
      raise ConfigError(
        f'AdapterConfig.dim={self.adapter.dim} differs from '
        f'DecoderConfig.dim={self.decoder.dim}: image features replace '
        'embeddings, so both must be equal'
      )
    for name, known in (
      ('remat', remat.POLICIES),
      ('vision_remat', (None, *remat.POLICIES)),
      ('attention', attention.KERNELS),
    ):
      if getattr(self, name) not in known:
        raise ConfigError(
          f'QwenVLConfig.{name}={getattr(self, name)!r} is none of '
          f'{", ".join(map(repr, known))}'
        )

  def replace(self, **changes) -> 'QwenVLConfig':
    return dataclasses.replace(self, **changes)


def qwen_vl_7b(**changes) -> QwenVLConfig:
  """The released 9.6B model (853 tensors, 9,656,935,168 values)."""
  return QwenVLConfig(**changes)


def _float_type(name: str, value: Any) -> Any:
  """The dtype of a name such as 'bfloat16'; ConfigError if it is no float."""
  try:
    found = None if value is None else jnp.dtype(value)
  except TypeError:
    found = None
  if found is None or not jnp.issubdtype(found, jnp.floating):
    raise ConfigError(
      f"QwenVLConfig.{name}={value!r} is none of 'bfloat16', 'float32', "
      "'float16'"
    )
  return found
