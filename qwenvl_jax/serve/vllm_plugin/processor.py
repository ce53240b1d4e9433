"""Pictures of a prompt: to the model's square, and into their spans."""

import numpy as np
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import (
  BaseDummyInputsBuilder,
  BaseMultiModalProcessor,
  BaseProcessingInfo,
  ProcessorInputs,
  PromptReplacement,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from qwenvl_jax import image as pictures_lib
from qwenvl_jax.errors import DataError
from qwenvl_jax.infer.prompts import image_starts


class ProcessingInfo(BaseProcessingInfo):
  """A prompt may have any number of pictures, of `queries` tokens each."""

  def get_supported_mm_limits(self):
    return {'image': None}

  def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
    return {'image': self.get_tokenizer().config.adapter.queries}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
  """Grey pictures to try memory with."""

  def get_dummy_text(self, mm_counts) -> str:
    return ''

  def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
    side = self.info.get_tokenizer().config.vision.image_size
    grey = np.full((side, side, 3), 128, np.uint8)
    return {'image': [grey] * mm_counts.get('image', 0)}

  def get_dummy_processor_inputs(self, seq_len, mm_counts, mm_options):
    tokenizer = self.info.get_tokenizer()
    start = tokenizer.config.image_start_id
    span = [start, *[start + 2] * tokenizer.config.adapter.queries, start + 1]
    data = self.get_dummy_mm_data(seq_len, mm_counts, mm_options)
    return ProcessorInputs(
      prompt=span * mm_counts.get('image', 0),
      mm_data_items=self.info.parse_mm_data(data, validate=False),
    )


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
  """Our preprocessing; prompts come with whole spans of ids."""

  def _apply_hf_processor_main(self, prompt, mm_items, *_, **__):
    tokenizer = self.info.get_tokenizer()
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    features = BatchFeature()
    if mm_items.get_all_counts().get('image'):
      items = mm_items.get_items('image', ImageProcessorItems)
      side = tokenizer.config.vision.image_size
      pixels = [_pixels(item, side) for item in items.data]
      features = BatchFeature({'pixels': np.stack(pixels)}, tensor_type='pt')
    return ids, features, True

  def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
    return {'pixels': MultiModalFieldConfig.batched('image')}

  def _get_prompt_updates(self, *_, **__):
    # Spans are whole already. vLLM counts these, and looks for nothing.
    start = self.info.get_tokenizer().config.image_start_id
    return [
      PromptReplacement(modality='image', target=[start], replacement=[start])
    ]

  def _find_mm_placeholders(self, new_token_ids, mm_prompt_updates):
    config = self.info.get_tokenizer().config
    queries = config.adapter.queries
    try:
      starts = image_starts(new_token_ids, config, 'the prompt')
    except DataError as error:
      raise ValueError(str(error)) from error
    pictures = len(mm_prompt_updates.get('image', ()))
    if len(starts) != pictures:
      raise ValueError(
        f'the prompt has {len(starts)} <img> spans and comes with {pictures} '
        'pictures; give one picture a span'
      )
    return {
      'image': [
        PlaceholderFeaturesInfo(
          modality='image',
          item_idx=index,
          start_idx=start,
          tokens=new_token_ids[start : start + queries],
          is_embed=None,
        )
        for index, start in enumerate(starts)
      ]
    }


def _pixels(item, side: int) -> np.ndarray:
  """[side,side,3] uint8, of what was sent where vLLM still has it."""
  if isinstance(item, MediaWithBytes):
    item = item.original_bytes
  try:
    return pictures_lib.pixels(item, side, 'the request')
  except DataError as error:
    raise ValueError(str(error)) from error
