"""`/v1/chat/completions`."""

import asyncio
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from qwenvl_jax.serve import answering, asking
from qwenvl_jax.serve.answering import Choice
from qwenvl_jax.serve.conversation import boxes_in_pixels
from qwenvl_jax.serve.limits import ApiError
from qwenvl_jax.serve.pictures import read_pictures
from qwenvl_jax.serve.schemas import ChatRequest
from qwenvl_jax.serve.server import Server


async def chat(server: Server, body: ChatRequest, salt: bytes, wait: Any):
  """Answers a conversation.

  Args:
    salt: pictures are shared between requests of one.
    wait: coroutine function that waits until `Answers` have ended, see
      `server.finish`.

  Raises:
    ApiError: the request cannot be answered.
  """
  limits, config = server.limits, server.config
  model = server.find_model(body.model)['id']
  _check(body, limits)
  stops = asking.stop_texts(body, limits)
  grammar = await asyncio.to_thread(
    asking.compile_grammar, body, server.compiler
  )
  prompt = await asyncio.to_thread(server.prompt, body)
  wanted = body.max_completion_tokens or body.max_tokens
  room = asking.room_for(len(prompt.tokens), wanted, server.max_len)
  pictures = await read_pictures(prompt.urls, limits, config.vision.image_size)
  sizes = [picture.size for picture in pictures]
  requests = asking.engine_requests(
    config,
    server.tokenizer,
    body,
    prompt.tokens,
    [picture.pixels for picture in pictures],
    room,
    grammar,
    top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    timeout=limits.seconds,
    adapter=server.adapter(model),
    salt=salt,
  )
  answers = server.ask(requests, stops)
  texts = answering.TokenTexts(server.tokenizer)

  def logprobs(tokens):
    return texts.chat(tokens) if body.logprobs else None

  if body.stream:
    about = answering.head('chat.completion.chunk', model)

    def chunk(choice: Choice, text: str, tokens) -> dict:
      delta = {'content': text} if text else {}
      if choice.finish_reason:
        boxes = boxes_in_pixels(choice.writer.text, sizes)
        delta |= {'boxes': boxes} if boxes else {}
      return {
        'index': choice.index,
        'delta': delta,
        'logprobs': logprobs(tokens),
        'finish_reason': choice.finish_reason,
      }

    first = [
      {
        'index': choice.index,
        'delta': {'role': 'assistant', 'content': ''},
        'logprobs': None,
        'finish_reason': None,
      }
      for choice in answers.choices
    ]
    options = body.stream_options
    usage = answers.usage if options and options.include_usage else None
    return StreamingResponse(
      answering.stream(answers, about, chunk, first, usage),
      media_type='text/event-stream',
    )

  await wait(answers)
  return JSONResponse(
    answering.head('chat.completion', model)
    | {
      'choices': [
        {
          'index': choice.index,
          'message': {
            'role': 'assistant',
            'content': choice.writer.text,
            'refusal': None,
            'boxes': boxes_in_pixels(choice.writer.text, sizes),
          },
          'logprobs': logprobs(choice.tokens),
          'finish_reason': choice.finish_reason,
        }
        for choice in answers.choices
      ],
      'usage': answers.usage(),
    }
  )


def _check(body: ChatRequest, limits) -> None:
  if body.n > limits.choices:
    raise ApiError(f'n={body.n} is more than {limits.choices}', 'n')
  if body.top_logprobs is not None and not body.logprobs:
    raise ApiError('top_logprobs needs logprobs=true', 'top_logprobs')
  if body.stream_options and not body.stream:
    raise ApiError('stream_options needs stream=true', 'stream_options')
