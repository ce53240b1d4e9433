"""`config.json` of the released layout to `QwenVLConfig` and back.

The released file is also our own checkpoints' format; what it cannot say
(number of queries, window attention, ...) goes into extra keys of `visual`,
written only where they differ from the release.
"""

import math

from qwenvl_jax.conversion import json_schema, schemas
from qwenvl_jax.conversion.families.foreign import of_model_type
from qwenvl_jax.errors import CheckpointError, ConfigError
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)

# The release's adapter has one head per this many channels.
_ADAPTER_HEAD_DIM = 128

# Keys of config.json that hold fields of the decoder as they are.
_DECODER = {
  'layer_norm_epsilon': 'norm_eps',
  'max_position_embeddings': 'max_position_embeddings',
  'use_dynamic_ntk': 'dynamic_ntk',
  'use_logn_attn': 'logn',
  'vocab_size': 'vocab_size',
  'hidden_size': 'dim',
  'num_hidden_layers': 'layers',
  'num_attention_heads': 'heads',
  'kv_channels': 'head_dim',
  'seq_length': 'seq_length',
}

# The same of `visual` and the vision transformer; and all of its keys that only
# our files have, where they differ from the release.
_VISION = (
  'heads', 'image_size', 'layers', 'patch_size', 'width', 'position_grid',
  'window', 'global_every',
)  # fmt: skip
_OURS = ('queries', 'adapter_heads', 'position_grid', 'window', 'global_every')

# How packed kernels are, in the words of the release.
_GPTQ = {'quant_method': 'gptq', 'bits': 4, 'desc_act': False}

# What is added to stored zero points, by the name of the format.
ZERO_OFFSETS = {'gptq': 1, 'gptq_v2': 0}


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
    CheckpointError: another model family, a key that is missing, or a value of
      another type or beyond all models.
  """
  family = raw.get('model_type')
  if family != 'qwen':
    raise CheckpointError(
      f"{where}: model_type is {str(family)[:80]!r}, not 'qwen': this looks "
      f'like {of_model_type(family)}. Qwen-VL, Qwen-VL-Chat and Qwen-7B can be '
      'read'
    )
  values = json_schema.check(raw, schemas.CONFIG, where)
  try:
    decoder = _decoder(values, int4)
    if values['visual'] is None:
      heads = _adapter_heads(decoder.dim)
      adapter = AdapterConfig(dim=decoder.dim, heads=heads)
      return QwenVLConfig(decoder=decoder, adapter=adapter)
    return _with_visual(decoder, values['visual'])
  except ConfigError as error:
    raise CheckpointError(f'{where}: {error}') from error


def _decoder(values: dict, int4: bool) -> DecoderConfig:
  packed = values['quantization_config'] if int4 else None
  form = packed and packed['checkpoint_format'] or 'gptq'
  return DecoderConfig(
    **{field: values[key] for key, field in _DECODER.items()},
    mlp_dim=values['intermediate_size'] // 2,
    rope_base=float(values['rotary_emb_base']),
    int4_group=packed and packed['group_size'],
    int4_zero_offset=ZERO_OFFSETS[form],
  )


def _with_visual(decoder: DecoderConfig, visual: dict) -> QwenVLConfig:
  dim = visual['output_dim']
  return QwenVLConfig(
    decoder=decoder,
    vision=VisionConfig(
      **{key: visual[key] for key in _VISION},
      mlp_dim=int(visual['width'] * visual['mlp_ratio']),
    ),
    adapter=AdapterConfig(
      queries=visual['queries'],
      dim=dim,
      heads=visual['adapter_heads'] or _adapter_heads(dim),
    ),
    image_start_id=visual['image_start_id'],
  )


def _adapter_heads(dim: int) -> int:
  return max(dim // _ADAPTER_HEAD_DIM, 1)


def config_to_hf(config: QwenVLConfig) -> dict:
  """Inverts `config_from_hf`, with every key the release has."""
  decoder, vision, adapter = config.decoder, config.vision, config.adapter
  visual = {key: getattr(vision, key) for key in _VISION} | {
    'image_start_id': config.image_start_id,
    'mlp_ratio': _mlp_ratio(vision),
    'output_dim': adapter.dim,
    'queries': adapter.queries,
    'adapter_heads': adapter.heads,
  }
  released = {key: schemas.VISUAL[key].default for key in _OURS}
  released['adapter_heads'] = _adapter_heads(adapter.dim)
  visual = {k: v for k, v in visual.items() if released.get(k, ...) != v}
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
    'no_bias': True,
    'rotary_emb_base': int(decoder.rope_base),
    'rotary_pct': 1.0,
    'scale_attn_weights': True,
    'tie_word_embeddings': False,
    'use_cache': True,
    'torch_dtype': 'bfloat16',
    **{key: getattr(decoder, field) for key, field in _DECODER.items()},
    'intermediate_size': 2 * decoder.mlp_dim,
    'visual': visual,
  }
  if decoder.int4_group is not None:
    raw['quantization_config'] = _GPTQ | {'group_size': decoder.int4_group}
    if decoder.int4_zero_offset != ZERO_OFFSETS['gptq']:
      raw['quantization_config']['checkpoint_format'] = 'gptq_v2'
  return raw


def _mlp_ratio(vision: VisionConfig) -> float:
  """Gives a ratio with four decimals, as released, that yields `mlp_dim`."""
  ratio = math.ceil(vision.mlp_dim / vision.width * 1e4) / 1e4
  if int(vision.width * ratio) != vision.mlp_dim:
    ratio = (vision.mlp_dim + 0.5) / vision.width
  return ratio
