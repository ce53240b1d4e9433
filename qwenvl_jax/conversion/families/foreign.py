"""Which family of models a checkpoint of others looks like."""

from collections.abc import Iterable
from typing import Any

_MODEL_TYPES = {
  'bert': 'BERT',
  'blip-2': 'BLIP-2',
  'clip': 'CLIP (the transformers layout; OpenCLIP is read)',
  'gemma': 'Gemma',
  'gpt2': 'GPT-2',
  'instructblip': 'InstructBLIP',
  'llama': 'Llama',
  'llava': 'LLaVA',
  'mistral': 'Mistral',
  'qwen2': 'Qwen2',
  'qwen2_5_vl': 'Qwen2.5-VL',
  'qwen2_vl': 'Qwen2-VL',
  'qwen3': 'Qwen3',
  't5': 'T5',
}

# Fragments of tensor names, most telling first.
_NAMES = (
  (
    '.lora_A.',
    'an adapter beside its model (PEFT: merge_and_unload() joins them)',
  ),
  ('multi_modal_projector.', 'LLaVA'),
  ('qformer.', 'BLIP-2'),
  ('visual.blocks.', 'Qwen2-VL'),
  (
    'visual.transformer.resblocks.',
    'OpenCLIP (see qwenvl-convert init-stage1)',
  ),
  ('text_model.encoder.layers.', 'CLIP (the transformers layout)'),
  ('model.layers.', 'Llama or one of its kin (Mistral, Qwen2, ...)'),
  ('encoder.layer.', 'BERT'),
  ('.attn.c_attn.', 'GPT-2'),
)


def of_model_type(model_type: Any) -> str:
  """Tells what config.json's `model_type` stands for."""
  known = isinstance(model_type, str) and _MODEL_TYPES.get(model_type)
  return known or 'a family that is not known here'


def of_names(names: Iterable[str]) -> str | None:
  """Tells what unknown tensor names look like, None if like nothing."""
  names = list(names)
  for fragment, family in _NAMES:
    ours = () if fragment == '.lora_A.' else 'transformer.'
    if any(fragment in n and not n.startswith(ours) for n in names):
      return family
  return None
