"""What every JSON file of a checkpoint must hold: keys, types and ranges.

Ranges are far beyond any model; they keep sizes and counts that no file can
mean from becoming memory and time.
"""

from qwenvl_jax.conversion.json_schema import (
  FILE_NAMES,
  FLAG,
  TEXT,
  Field,
  Schema,
  an_object,
  one_of,
  real,
  whole,
)

_WIDTH = whole(1, 2**20)
_LAYERS = whole(1, 2**12)
_HEADS = whole(1, 2**12)
_IDS = whole(0, 2**24)
_LENGTH = whole(1, 2**24)
_PIXELS = whole(1, 2**14)
_RATIO = real(1e-3, 1e3)

# quantization_config of config.json, and quantize_config.json.
QUANTIZATION: Schema = {
  'quant_method': Field(one_of('gptq'), 'gptq'),
  'bits': Field(one_of(4)),
  'group_size': Field(whole(-1, 2**20)),
  'desc_act': Field(FLAG, False),
  'sym': Field(FLAG, None),
  'checkpoint_format': Field(one_of('gptq', 'gptq_v2'), None),
}

# What the release fixes has a default; our own files name it where it differs.
VISUAL: Schema = {
  'image_size': Field(_PIXELS),
  'patch_size': Field(_PIXELS),
  'width': Field(_WIDTH),
  'layers': Field(_LAYERS),
  'heads': Field(_HEADS),
  'mlp_ratio': Field(_RATIO),
  'output_dim': Field(_WIDTH),
  'image_start_id': Field(_IDS),
  'queries': Field(whole(1, 2**16), 256),
  'adapter_heads': Field(_HEADS, None),
  'position_grid': Field(whole(1, 2**10), 16),
  'window': Field(whole(1, 2**10), None),
  'global_every': Field(_LAYERS, 4),
}

CONFIG: Schema = {
  'vocab_size': Field(whole(1, 2**24)),
  'hidden_size': Field(_WIDTH),
  'num_hidden_layers': Field(_LAYERS),
  'num_attention_heads': Field(_HEADS),
  'kv_channels': Field(whole(1, 2**14)),
  'intermediate_size': Field(whole(2, 2**22)),
  'layer_norm_epsilon': Field(real(0, 1)),
  'rotary_emb_base': Field(real(1, 1e12)),
  'seq_length': Field(_LENGTH),
  'max_position_embeddings': Field(_LENGTH),
  'use_dynamic_ntk': Field(FLAG),
  'use_logn_attn': Field(FLAG),
  'quantization_config': Field(an_object(QUANTIZATION), None),
  'visual': Field(an_object(VISUAL), None),
}

# generation_config.json: what is looked at; all of it travels along.
GENERATION: Schema = {'chat_format': Field(TEXT, None)}

# model.safetensors.index.json, pytorch_model.bin.index.json.
INDEX: Schema = {'weight_map': Field(FILE_NAMES)}

# open_clip_config.json.
_VISION_CFG: Schema = {
  'width': Field(_WIDTH),
  'patch_size': Field(_PIXELS),
  'image_size': Field(_PIXELS),
  'layers': Field(_LAYERS),
  'head_width': Field(_WIDTH, 64),
  'mlp_ratio': Field(_RATIO, 4.0),
}
OPENCLIP: Schema = {
  'model_cfg': Field(an_object({'vision_cfg': Field(an_object(_VISION_CFG))}))
}
