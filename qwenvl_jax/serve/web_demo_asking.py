"""How the web demo asks: by the function that answers `/v1/chat/completions`.

The same limits hold for it, and the same text is control ids to it: none.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pydantic

from qwenvl_jax.serve import chats
from qwenvl_jax.serve.limits import ApiError
from qwenvl_jax.serve.schemas import ChatRequest
from qwenvl_jax.serve.server import Server

# Seconds between two looks of a page: a browser shows no more.
_PAUSE = 0.08


async def ask(
  server: Server, salt: bytes, messages: list[dict[str, Any]], **settings
) -> AsyncIterator[str]:
  """Yields an answer in pieces; left early, it frees its slot.

  Raises:
    ApiError: as the routes do.
  """
  try:
    body = ChatRequest(messages=messages, stream=True, **settings)
  except pydantic.ValidationError as error:
    first = error.errors()[0]
    raise ApiError(first['msg'][:500]) from error
  response = await chats.chat(server, body, salt, wait=None)
  async with contextlib.aclosing(response.body_iterator) as events:
    async for event in events:
      data = event.removeprefix('data: ').strip()
      if data == '[DONE]':
        return
      found = json.loads(data)
      if 'error' in found:
        error = found['error']
        raise ApiError(error['message'], code=error['code'])
      if text := found['choices'][0]['delta'].get('content'):
        yield text


async def grouped(
  pieces: AsyncIterator[str], wanted: Callable[[], bool]
) -> AsyncIterator[str]:
  """Yields the same text in fewer pieces, as long as it is wanted.

  Args:
    pieces: of the text; it is closed at the end.
    wanted: whether somebody still waits for the text. It is asked every
      `_PAUSE` seconds, also while no piece comes.
  """
  held, step, last = '', None, 0.0
  async with contextlib.aclosing(pieces):
    try:
      while wanted():
        step = step or asyncio.ensure_future(anext(pieces))
        done, _ = await asyncio.wait({step}, timeout=_PAUSE)
        if done:
          step, ended = None, step
          try:
            held += ended.result()
          except StopAsyncIteration:
            break
        if held and time.monotonic() - last >= _PAUSE:
          yield held
          held, last = '', time.monotonic()
    finally:
      if step:
        step.cancel()
        await asyncio.wait({step})
  if held and wanted():
    yield held
