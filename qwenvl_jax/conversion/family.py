"""Which family of models a checkpoint of others looks like."""

from collections.abc import Iterable

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


def of_model_type(model_type: str | None) -> str:
  """What config.json's `model_type` stands for."""
  return _MODEL_TYPES.get(model_type, 'a family that is not known here')


def of_names(names: Iterable[str]) -> str | None:
  """What tensor names other than Qwen-VL's look like, None if like nothing."""
  foreign = [n for n in names if not n.startswith('transformer.')]
  for fragment, family in _NAMES:
    if any(fragment in name for name in foreign):
      return family
  return None
