"""The conversion table of low-rank factors: PEFT's names, paths, axes."""

from qwenvl_jax.conversion.families.qwen_vl.table import (
  decoder_sizes,
  vision_sizes,
)
from qwenvl_jax.conversion.rules import Row, Rule, make_rules
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.lora import TARGETS

_BLOCKS = {
  'decoder/blocks/': 'transformer.h.*.',
  'vision/blocks/': 'transformer.visual.transformer.resblocks.*.',
}

# By target (`model.lora.TARGETS`): its two factors.
# fmt: off
_ROWS: dict[str, tuple[Row, Row]] = {
  'decoder/blocks/attn/qkv': (
   ('lora_A', 'attn/qkv/lora_a', 'rank dim -> dim rank'),
   ('lora_B', 'attn/{q,k,v}/lora_b',
    '(qkv heads head_dim) rank -> qkv rank heads head_dim')),
  'decoder/blocks/attn/out': (
   ('lora_A', 'attn/out/lora_a',
    'rank (heads head_dim) -> heads head_dim rank'),
   ('lora_B', 'attn/out/lora_b', 'dim rank -> rank dim')),
  'decoder/blocks/mlp/up': (
   ('lora_A', 'mlp/up/lora_a', 'rank dim -> dim rank'),
   ('lora_B', 'mlp/up/lora_b', 'mlp rank -> rank mlp')),
  'decoder/blocks/mlp/gate': (
   ('lora_A', 'mlp/gate/lora_a', 'rank dim -> dim rank'),
   ('lora_B', 'mlp/gate/lora_b', 'mlp rank -> rank mlp')),
  'decoder/blocks/mlp/down': (
   ('lora_A', 'mlp/down/lora_a', 'rank mlp -> mlp rank'),
   ('lora_B', 'mlp/down/lora_b', 'dim rank -> rank dim')),
  'vision/blocks/attn/qkv': (
   ('lora_A', 'attn/qkv/lora_a', 'rank width -> width rank'),
   ('lora_B', 'attn/{q,k,v}/lora_b',
    '(heads qkv head_dim) rank -> qkv rank heads head_dim')),
  'vision/blocks/attn/out': (
   ('lora_A', 'attn/out/lora_a',
    'rank (heads head_dim) -> heads head_dim rank'),
   ('lora_B', 'attn/out/lora_b', 'width rank -> rank width')),
  'vision/blocks/mlp/up': (
   ('lora_A', 'mlp/up/lora_a', 'rank width -> width rank'),
   ('lora_B', 'mlp/up/lora_b', 'mlp rank -> rank mlp')),
  'vision/blocks/mlp/down': (
   ('lora_A', 'mlp/down/lora_a', 'rank mlp -> mlp rank'),
   ('lora_B', 'mlp/down/lora_b', 'width rank -> rank width')),
}
# fmt: on


def lora_rules(config: QwenVLConfig) -> list[Rule]:
  """Makes the rules of all factors of a model's `lora`, named as PEFT does."""
  sizes = {
    'decoder/blocks/': decoder_sizes(config) | {'rank': config.lora.rank},
    'vision/blocks/': vision_sizes(config) | {'rank': config.lora.rank},
  }
  layers = {
    'decoder/blocks/': config.decoder.layers,
    'vision/blocks/': config.vision.layers,
  }
  rules = []
  for target in config.lora.names:
    (tower,) = (x for x in _BLOCKS if target.startswith(x))
    rows = tuple(
      (f'{TARGETS[target]}.{name}.weight', *rest)
      for name, *rest in _ROWS[target]
    )
    rules += make_rules(
      rows, sizes[tower], _BLOCKS[tower], tower, layers[tower]
    )
  return rules


def layer_name(target: str) -> str:
  """Gives the released name of a target's layers, `*` for the layer's number.

  >>> layer_name('decoder/blocks/attn/qkv')
  'transformer.h.*.attn.c_attn'
  """
  (tower,) = (x for x in _BLOCKS if target.startswith(x))
  return _BLOCKS[tower] + TARGETS[target]
