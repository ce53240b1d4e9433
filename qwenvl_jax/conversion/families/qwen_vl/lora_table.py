"""The conversion table of low-rank factors, which follows from the kernels'."""

import dataclasses
import re
from collections.abc import Iterator

from qwenvl_jax.conversion.families.qwen_vl.table import rules
from qwenvl_jax.conversion.rules import FUSED, Rule
from qwenvl_jax.model.config import QwenVLConfig
from qwenvl_jax.model.lora import TARGETS

_BLOCKS = {
  'decoder': 'transformer.h.*.',
  'vision': 'transformer.visual.transformer.resblocks.*.',
}


def lora_rules(config: QwenVLConfig) -> list[Rule]:
  """Makes the rules of all factors of a model's `lora`, named as PEFT does."""
  decoder = dataclasses.replace(config.decoder, int4_group=None)
  kernels = {
    rule.tensor: rule
    for rule in rules(config.replace(decoder=decoder), tuple(_BLOCKS))
  }
  return [
    factor
    for target in config.lora.names
    for factor in _factors(
      target, kernels[f'{layer_name(target)}.weight'], config.lora.rank
    )
  ]


def _factors(target: str, kernel: Rule, rank: int) -> Iterator[Rule]:
  """The rules of both factors of a kernel, '(heads head_dim) dim -> ..'."""
  outputs, inputs = re.findall(r'\(.*?\)|\w+', kernel.pattern.split(' -> ')[0])
  fused = f'{FUSED} ' * (FUSED in outputs)
  second = (path.replace('/kernel', '/lora_b') for path in kernel.paths)
  for name, paths, pattern in (
    ('lora_A', [f'{target}/lora_a'], f'rank {inputs} -> {_axes(inputs)} rank'),
    ('lora_B', second, f'{outputs} rank -> {fused}rank {_axes(outputs)}'),
  ):
    sizes = kernel.sizes | {'rank': rank}
    yield dataclasses.replace(
      kernel,
      tensor=f'{layer_name(target)}.{name}.weight',
      paths=tuple(paths),
      pattern=pattern,
      sizes={axis: sizes[axis] for axis in re.findall(r'\w+', pattern)},
    )


def _axes(group: str) -> str:
  """'(qkv heads head_dim)' to 'heads head_dim'."""
  return ' '.join(x for x in re.findall(r'\w+', group) if x != FUSED)


def layer_name(target: str) -> str:
  """Gives the released name of a target's layers, `*` for the layer's number.

  >>> layer_name('decoder/blocks/attn/qkv')
  'transformer.h.*.attn.c_attn'
  """
  return _BLOCKS[target.split('/')[0]] + TARGETS[target]
