"""`config.json` of the released layout to `QwenVLConfig` and back.

The released file is also our own checkpoints' format; what it cannot say
(number of queries, window attention, ...) goes into extra keys of `visual`,
written only where they differ from the release.
"""

import math

from qwenvl_jax.conversion.family import of_model_type
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)

# The release's adapter has one head per this many channels.
_ADAPTER_HEAD_DIM = 128

# What the release fixes without saying so in its config.json.
_EXTRAS = {
  'queries': 256,
  'adapter_heads': None,
  'position_grid': 16,
  'window': None,
  'global_every': 4,
}

# How packed kernels are, in the words of the release.
_GPTQ = {'quant_method': 'gptq', 'bits': 4, 'desc_act': False}


def _int4_group(raw: dict) -> int | None:
  quantization = raw.get('quantization_config')
  return quantization and quantization['group_size']


def _adapter_heads(dim: int) -> int:
  return max(dim // _ADAPTER_HEAD_DIM, 1)


def config_from_hf(
  raw: dict, where: str = 'config.json', int4: bool = True
) -> QwenVLConfig:
  """Reads a released (or our) config.json.

  Args:
    raw: the parsed file.
    where: its path, for messages.
    int4: whether kernels that `quantization_config` calls packed are so in the
      model; they are not where they are dequantized on reading.

  Returns:
    The config; a Qwen-7B without `visual` gets the default vision tower.

  Raises:
    CheckpointError: another model family, or a key is missing.
  """
  family = raw.get('model_type')
  if family != 'qwen':
    raise CheckpointError(
      f"{where}: model_type is {family!r}, not 'qwen': this looks like "
      f'{of_model_type(family)}. Qwen-VL, Qwen-VL-Chat and Qwen-7B can be read'
    )
  try:
    decoder = DecoderConfig(
      vocab_size=raw['vocab_size'],
      dim=raw['hidden_size'],
      layers=raw['num_hidden_layers'],
      heads=raw['num_attention_heads'],
      head_dim=raw['kv_channels'],
      mlp_dim=raw['intermediate_size'] // 2,
      norm_eps=raw['layer_norm_epsilon'],
      rope_base=float(raw['rotary_emb_base']),
      seq_length=raw['seq_length'],
      max_position_embeddings=raw['max_position_embeddings'],
      dynamic_ntk=raw['use_dynamic_ntk'],
      logn=raw['use_logn_attn'],
      int4_group=_int4_group(raw) if int4 else None,
    )
    visual = raw.get('visual')
    if visual is None:
      return QwenVLConfig(
        decoder=decoder,
        adapter=AdapterConfig(
          dim=decoder.dim, heads=_adapter_heads(decoder.dim)
        ),
      )
    extras = _EXTRAS | visual
    vision = VisionConfig(
      image_size=visual['image_size'],
      patch_size=visual['patch_size'],
      width=visual['width'],
      layers=visual['layers'],
      heads=visual['heads'],
      mlp_dim=int(visual['width'] * visual['mlp_ratio']),
      position_grid=extras['position_grid'],
      window=extras['window'],
      global_every=extras['global_every'],
    )
    return QwenVLConfig(
      decoder=decoder,
      vision=vision,
      adapter=AdapterConfig(
        queries=extras['queries'],
        dim=visual['output_dim'],
        heads=extras['adapter_heads'] or _adapter_heads(visual['output_dim']),
      ),
      image_start_id=visual['image_start_id'],
    )
  except KeyError as error:
    raise CheckpointError(
      f'{where}: key {error} is missing; is this the config.json of a Qwen-VL '
      'checkpoint?'
    ) from error


def config_to_hf(config: QwenVLConfig) -> dict:
  """The inverse of `config_from_hf`, with every key the release has."""
  decoder, vision, adapter = config.decoder, config.vision, config.adapter
  visual = {
    'heads': vision.heads,
    'image_size': vision.image_size,
    'image_start_id': config.image_start_id,
    'layers': vision.layers,
    'mlp_ratio': _mlp_ratio(vision),
    'output_dim': adapter.dim,
    'patch_size': vision.patch_size,
    'width': vision.width,
  }
  extras = {
    'queries': adapter.queries,
    'adapter_heads': adapter.heads,
    'position_grid': vision.position_grid,
    'window': vision.window,
    'global_every': vision.global_every,
  }
  released = _EXTRAS | {'adapter_heads': _adapter_heads(adapter.dim)}
  visual |= {k: v for k, v in extras.items() if v != released[k]}
  raw = {
    'architectures': ['QWenLMHeadModel'],
    'auto_map': {
      'AutoConfig': 'configuration_qwen.QWenConfig',
      'AutoModelForCausalLM': 'modeling_qwen.QWenLMHeadModel',
    },
    'model_type': 'qwen',
    'attn_dropout_prob': 0.0,
    'emb_dropout_prob': 0.0,
    'initializer_range': 0.02,
    'layer_norm_epsilon': decoder.norm_eps,
    'max_position_embeddings': decoder.max_position_embeddings,
    'no_bias': True,
    'rotary_emb_base': int(decoder.rope_base),
    'rotary_pct': 1.0,
    'scale_attn_weights': True,
    'tie_word_embeddings': False,
    'use_cache': True,
    'use_dynamic_ntk': decoder.dynamic_ntk,
    'use_logn_attn': decoder.logn,
    'torch_dtype': 'bfloat16',
    'vocab_size': decoder.vocab_size,
    'hidden_size': decoder.dim,
    'num_hidden_layers': decoder.layers,
    'num_attention_heads': decoder.heads,
    'kv_channels': decoder.head_dim,
    'intermediate_size': 2 * decoder.mlp_dim,
    'seq_length': decoder.seq_length,
    'visual': visual,
  }
  if decoder.int4_group is not None:
    raw['quantization_config'] = _GPTQ | {'group_size': decoder.int4_group}
  return raw


def _mlp_ratio(vision: VisionConfig) -> float:
  """A ratio with four decimals, as released, that truncates to `mlp_dim`."""
  ratio = math.ceil(vision.mlp_dim / vision.width * 1e4) / 1e4
  if int(vision.width * ratio) != vision.mlp_dim:
    ratio = (vision.mlp_dim + 0.5) / vision.width
  return ratio
