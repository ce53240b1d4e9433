"""`config.json` of the released layout to `QwenVLConfig` and back.

The released file is also our own checkpoints' format; what it cannot say
(number of queries, window attention) goes into extra keys of `visual`.
"""

import math

from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.model.config import (
  AdapterConfig,
  DecoderConfig,
  QwenVLConfig,
  VisionConfig,
)

# The release fixes what its config.json does not say.
_RELEASED_QUERIES = 256
_RELEASED_ADAPTER_HEAD_DIM = 128


def config_from_hf(raw: dict, where: str = 'config.json') -> QwenVLConfig:
  """Reads a released (or our) config.json.

  Args:
    raw: the parsed file.
    where: its path, for messages.

  Returns:
    The config; a Qwen-7B without `visual` gets the default vision tower.

  Raises:
    CheckpointError: another model family, or a key is missing.
  """
  family = raw.get('model_type')
  if family != 'qwen':
    raise CheckpointError(
      f"{where}: model_type is {family!r}, not 'qwen'. This looks like another "
      'model family; Qwen-VL and Qwen-VL-Chat checkpoints can be read'
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
    )
    visual = raw.get('visual')
    if visual is None:
      return QwenVLConfig(
        decoder=decoder,
        adapter=AdapterConfig(
          dim=decoder.dim,
          heads=max(decoder.dim // _RELEASED_ADAPTER_HEAD_DIM, 1),
        ),
      )
    queries = visual.get('queries', _RELEASED_QUERIES)
    vision = VisionConfig(
      image_size=visual['image_size'],
      patch_size=visual['patch_size'],
      width=visual['width'],
      layers=visual['layers'],
      heads=visual['heads'],
      mlp_dim=int(visual['width'] * visual['mlp_ratio']),
      window=visual.get('window'),
      global_every=visual.get('global_every', 4),
    )
    return QwenVLConfig(
      decoder=decoder,
      vision=vision,
      adapter=AdapterConfig(
        queries=queries,
        dim=visual['output_dim'],
        heads=max(visual['output_dim'] // _RELEASED_ADAPTER_HEAD_DIM, 1),
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
  if adapter.queries != _RELEASED_QUERIES:
    visual['queries'] = adapter.queries
  if vision.window is not None:
    visual['window'] = vision.window
    visual['global_every'] = vision.global_every
  return {
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


def _mlp_ratio(vision: VisionConfig) -> float:
  """A ratio with four decimals, as released, that truncates to `mlp_dim`."""
  ratio = math.ceil(vision.mlp_dim / vision.width * 1e4) / 1e4
  if int(vision.width * ratio) != vision.mlp_dim:
    ratio = (vision.mlp_dim + 0.5) / vision.width
  return ratio
