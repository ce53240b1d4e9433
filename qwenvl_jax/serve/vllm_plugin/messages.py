"""vLLM's form of a conversation as ids."""

from collections.abc import Mapping, Sequence

from qwenvl_jax.serve.conversation import build_prompt
from qwenvl_jax.serve.limits import ApiError
from qwenvl_jax.serve.schemas import ImagePart, Message, TextPart
from qwenvl_jax.serve.vllm_plugin.tokenizer import ServedTokenizer


def prompt_ids(
  tokenizer: ServedTokenizer, conversation: Sequence[Mapping], options: Mapping
) -> list[int]:
  """Makes the context for the next answer.

  Args:
    tokenizer: the vocabulary.
    conversation: messages that vLLM has parsed in its form 'openai': contents
      are lists of parts, pictures among them without what they show.
    options: of the request: `add_generation_prompt`, `continue_final_message`,
      `add_vision_id`.

  Raises:
    ValueError: messages in an order or of a kind that the model does not know,
      or tools.
  """
  if options.get('tools'):
    raise ValueError('this model knows no tools')
  try:
    prompt = build_prompt(
      tokenizer.vocabulary,
      [_message(message) for message in conversation],
      tokenizer.config.adapter.queries,
      options.get('continue_final_message', False),
      options.get('add_generation_prompt', True),
      options.get('add_vision_id', True),
    )
  except ApiError as error:
    raise ValueError(str(error)) from error
  return prompt.tokens


def _message(message: Mapping) -> Message:
  content = message.get('content')
  if isinstance(content, list):
    content = [
      TextPart(type='text', text=part['text'])
      if part['type'] == 'text'
      else ImagePart(type='image_url', image_url='')
      for part in content
    ]
  return Message(role=message['role'], content=content)
