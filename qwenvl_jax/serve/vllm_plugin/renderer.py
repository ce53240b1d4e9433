"""Messages of a request become ids as in our server."""

from vllm.entrypoints.chat_utils import (
  parse_chat_messages,
  parse_chat_messages_async,
)
from vllm.renderers.base import BaseRenderer

from qwenvl_jax.serve.vllm_plugin.messages import prompt_ids


class Renderer(BaseRenderer):
  """vLLM fetches the pictures; their places are ours."""

  def render_messages(self, messages, params):
    """(conversation, prompt of ids with its pictures)."""
    parsed = parse_chat_messages(
      messages, self.model_config, **_how_to_parse(params)
    )
    return self._prompt(*parsed, params)

  async def render_messages_async(self, messages, params):
    """As `render_messages`."""
    parsed = await parse_chat_messages_async(
      messages, self.model_config, **_how_to_parse(params)
    )
    return self._prompt(*parsed, params)

  def _prompt(self, conversation, pictures, names, params):
    prompt = {
      'prompt_token_ids': prompt_ids(
        self.get_tokenizer(), conversation, params.chat_template_kwargs
      )
    }
    if pictures is not None:
      prompt['multi_modal_data'] = pictures
    if names is not None:
      prompt['multi_modal_uuids'] = names
    return conversation, prompt


def _how_to_parse(params) -> dict:
  if params.chat_template is not None:
    raise ValueError('this model has no other chat template than its own')
  return {
    'content_format': 'openai',
    'media_io_kwargs': params.media_io_kwargs,
    'mm_processor_kwargs': params.mm_processor_kwargs,
  }
