"""The model as tpu-inference runs it: our linen modules in an nnx.Module.

Tokens of all requests come one after the other, T in all, and the cache is
vLLM's: pages of one array a layer, read by tpu-inference's kernel for TPUs.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tpu_inference.layers.common.attention_interface import attention
from tpu_inference.layers.common.sharding import ShardingAxisName
from tpu_inference.utils import get_mesh_shape_product, get_padded_head_dim
from vllm.multimodal import MULTIMODAL_REGISTRY

from qwenvl_jax import api, buckets
from qwenvl_jax.batch import text_batch
from qwenvl_jax.conversion import checkpoint_io
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.qwen_vl import QwenVL
from qwenvl_jax.serve.vllm_plugin.processor import (
  DummyInputs,
  ProcessingInfo,
  Processor,
)


@MULTIMODAL_REGISTRY.register_processor(
  Processor, info=ProcessingInfo, dummy_inputs=DummyInputs
)
class ServedQwenVL(nnx.Module):
  """Qwen-VL from a checkpoint folder of any layout."""

  supports_multimodal = True
  supports_multimodal_raw_input_only = False

  @classmethod
  def get_placeholder_str(cls, modality: str, i: int) -> str | None:
    """None: what stands for a picture is ids, see `messages`."""
    return None

  def __init__(self, vllm_config, rng_key, mesh):
    settings = vllm_config.model_config
    self.folder = settings.model
    self.mesh = mesh
    dtype = jnp.dtype(settings.dtype)
    config = checkpoint_io.read_config(buckets.as_path(self.folder))
    if config.decoder.int4_group is not None:
      raise ConfigError(
        f'{self.folder} keeps kernels at 4 bits, which vLLM cannot run: '
        'convert without --keep_int4, or serve it by qwenvl-serve'
      )
    self.config = config.replace(
      dtype=dtype, param_dtype=dtype, remat='none', scan_layers=False
    )
    if settings.max_model_len > config.decoder.seq_length:
      raise ConfigError(
        f'--max-model-len={settings.max_model_len}: vLLM serves this model up '
        f'to {config.decoder.seq_length} tokens; qwenvl-serve does more'
      )
    boxed = _boxed_parameters(self.config)
    shapes, self.structure = jax.tree.flatten(nn.meta.unbox(boxed))
    self.leaves = nnx.List(
      [nnx.Param(jnp.zeros(x.shape, x.dtype)) for x in shapes]
    )

  def load_weights(self, rng_key) -> None:
    """Reads the folder, each chip its part."""
    del rng_key
    shardings = shard(_boxed_parameters(self.config), self.mesh)
    handle = api.load(self.folder, dtype=self.config.dtype, shardings=shardings)
    values = self.structure.flatten_up_to(handle.params)
    for leaf, value in zip(self.leaves, values, strict=True):
      leaf.set_value(value)

  def __call__(
    self,
    kv_caches,
    input_ids,
    attention_metadata,
    inputs_embeds=None,
    *_,
    **__,
  ):
    """Appends tokens to the cache.

    Args:
      kv_caches: one a layer.
      input_ids: [T] int32, None if there are embeddings.
      attention_metadata: whose tokens they are, and where they go.
      inputs_embeds: [T,D].

    Returns:
      (the caches, [T,D] hidden states, no others, no experts).
    """
    x = inputs_embeds
    if x is None:
      x = self.embed_input_ids(input_ids)
    hidden, caches = self._apply(
      lambda model, *arguments: model.decoder.serve(*arguments),
      x[None],
      attention_metadata.input_positions[None],
      kv_caches,
      functools.partial(_attend, attention_metadata, self.mesh),
    )
    return caches, hidden[0], [], None

  def compute_logits(self, hidden_states):
    """[T,V] of [T,D]."""
    return self._apply(QwenVL.head, hidden_states[None])[0]

  def embed_input_ids(
    self, input_ids, multimodal_embeddings=None, *, is_multimodal=None
  ):
    """Embeddings, those of pictures in their places.

    Args:
      input_ids: [T] int32.
      multimodal_embeddings: [M,D] features in the order of their places.
      is_multimodal: [T] bool, their places.

    Returns:
      [T,D].
    """
    x = self._apply(
      lambda model, ids: model.decoder.embed_tokens(ids), input_ids[None]
    )[0]
    if multimodal_embeddings is None:
      return x
    rows = jnp.maximum(jnp.cumsum(is_multimodal) - 1, 0)
    taken = jnp.take(multimodal_embeddings, rows, axis=0).astype(x.dtype)
    return jnp.where(is_multimodal[:, None], taken, x)

  def embed_multimodal(self, pixels, **_) -> list[jax.Array]:
    """Features [Q,D] of each picture [R,R,3] uint8."""
    encode, params = _encoder(self.config), self._params()
    return [encode(params, np.asarray(picture)[None])[0] for picture in pixels]

  def precompile_vision_encoder(self, run_compilation_fn) -> None:
    """Compiles `embed_multimodal` before there are requests."""
    side = self.config.vision.image_size
    run_compilation_fn(
      'vision_encoder',
      _encoder(self.config),
      self._params(),
      np.zeros((1, side, side, 3), np.uint8),
    )

  def modules(self) -> list:
    """Of torch, which vLLM looks through when it ends: none."""
    return []

  def _params(self) -> dict:
    return self.structure.unflatten([leaf.get_value() for leaf in self.leaves])

  def _apply(self, method, *arguments):
    return QwenVL(self.config).apply(
      {'params': self._params()}, *arguments, method=method
    )


def _attend(metadata, mesh, q, k, v, cache):
  """Attention of all tokens [1,T,N,H] through vLLM's cache."""
  size = q.shape[-1]
  pad = [(0, 0), (0, 0), (0, get_padded_head_dim(size) - size)]
  q, k, v = (jnp.pad(x[0], pad) for x in (q, k, v))
  cache, out = attention(cache, q, k, v, metadata, mesh, head_dim_original=size)
  return out[None, ..., :size], cache


@functools.lru_cache(maxsize=1)
def _encoder(config: QwenVLConfig):
  """Jitted (params, pixels [I,R,R,3]) -> features [I,Q,D]."""
  model = QwenVL(config)
  return jax.jit(
    lambda params, pixels: model.apply(
      {'params': params}, pixels, method='encode_images'
    )
  )


def _boxed_parameters(config: QwenVLConfig) -> dict:
  """Shapes of the parameters with their logical axes."""
  return jax.eval_shape(
    QwenVL(config).init, jax.random.key(0), text_batch([[0]])
  )['params']


def shard(boxed: dict, mesh) -> dict:
  """How parameters are split over vLLM's mesh.

  Args:
    boxed: leaves in `nn.LogicallyPartitioned`.
    mesh: of tpu-inference.

  Returns:
    The unboxed tree with a `NamedSharding` for each leaf.
  """
  axes = {
    'heads': ShardingAxisName.ATTN_HEAD,
    'mlp': ShardingAxisName.MLP_TENSOR,
    'vocab': ShardingAxisName.MLP_TENSOR,
  }

  def sharding(leaf):
    def split(name, size):
      axis = axes.get(name)
      return axis if size % get_mesh_shape_product(mesh, axis) == 0 else None

    spec = PartitionSpec(*map(split, leaf.names, leaf.value.shape))
    return NamedSharding(mesh, spec)

  return jax.tree.map(
    sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )
