"""`/v1/completions`: prompts continued as they are, or scored."""

import asyncio
import itertools
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse

from qwenvl_jax.infer.request import Token
from qwenvl_jax.serve import answering, asking
from qwenvl_jax.serve.answering import Choice
from qwenvl_jax.serve.conversation import check_chars, encode
from qwenvl_jax.serve.limits import ApiError
from qwenvl_jax.serve.pictures import check_count, read_pictures
from qwenvl_jax.serve.schemas import CompletionRequest, url_of
from qwenvl_jax.serve.server import Server
from qwenvl_jax.text.chatml import encode_parts

# Where a picture stands in a prompt.
PICTURE = '<img></img>'


async def complete(
  server: Server, body: CompletionRequest, salt: bytes, wait: Any
):
  """Continues prompts; see `chats.chat`.

  Raises:
    ApiError: the request cannot be answered.
  """
  limits, config, tokenizer = server.limits, server.config, server.tokenizer
  model = server.find_model(body.model)['id']
  prompts = await asyncio.to_thread(_prompts, server, body)
  pictures = await read_pictures(
    [url_of(image) for image in body.images], limits, config.vision.image_size
  )
  scored = body.echo and body.logprobs is not None
  if not body.max_tokens and not scored:
    raise ApiError(
      'max_tokens=0 is for scores of the prompt: echo=true with logprobs',
      'max_tokens',
    )
  stops = asking.stop_texts(body, limits)
  grammar = await asyncio.to_thread(
    asking.compile_grammar, body, server.compiler
  )
  requests = []
  for tokens in prompts:
    if body.max_tokens:
      asking.room_for(len(tokens), body.max_tokens, server.max_len)
    requests += asking.engine_requests(
      config,
      tokenizer,
      body,
      tokens,
      [picture.pixels for picture in pictures],
      body.max_tokens,
      grammar,
      top_logprobs=body.logprobs,
      prompt_logprobs=body.logprobs if scored else None,
      timeout=limits.seconds,
      adapter=server.adapter(model),
      salt=salt,
    )
  answers = server.ask(requests, stops)
  texts = answering.TokenTexts(tokenizer)

  def echoed(choice: Choice) -> str:
    tokens = choice.listening.answer.request.tokens
    return tokenizer.decode(tokens) if body.echo else ''

  def logprobs(choice: Choice, tokens, echo: bool, offset: int):
    if body.logprobs is None:
      return None
    before = _prompt_tokens(choice) if echo else []
    return texts.completion([*before, *tokens], offset)

  about = answering.head('text_completion', model)
  if body.stream:
    begun: set[int] = set()
    lengths: dict[int, int] = {}

    def chunk(choice: Choice, text: str, tokens) -> dict:
      echo = body.echo and choice.index not in begun
      begun.add(choice.index)
      text = echoed(choice) * echo + text
      offset = lengths.get(choice.index, 0)
      lengths[choice.index] = offset + len(text)
      return {
        'index': choice.index,
        'text': text,
        'logprobs': logprobs(choice, tokens, echo, offset),
        'finish_reason': choice.finish_reason,
      }

    options = body.stream_options
    wanted = options and options.include_usage
    usage = (lambda: answers.usage(len(prompts))) if wanted else None
    return StreamingResponse(
      answering.stream(answers, about, chunk, usage=usage),
      media_type='text/event-stream',
    )

  await wait(answers)
  return JSONResponse(
    about
    | {
      'choices': [
        {
          'index': choice.index,
          'text': echoed(choice) + choice.writer.text,
          'logprobs': logprobs(choice, choice.tokens, body.echo, 0),
          'finish_reason': choice.finish_reason,
        }
        for choice in answers.choices
      ],
      'usage': answers.usage(len(prompts)),
    }
  )


def _prompts(server: Server, body: CompletionRequest) -> list[list[int]]:
  """Ids of all prompts."""
  found = body.prompt
  if isinstance(found, str) or found and isinstance(found[0], int):
    found = [found]
  most = server.limits.choices
  if len(found) * body.n > most:
    raise ApiError(
      f'{len(found)} prompts times n={body.n} are more than {most} answers',
      'n',
    )
  if body.images:
    return [_with_pictures(server, body)]
  rows = []
  for row in found:
    if isinstance(row, str):
      check_chars(len(row), server.most_chars, 'prompt')
      row = encode(server.tokenizer, row)
    rows.append(row)
  if not rows or not all(rows):
    raise ApiError('prompt: at least one token is needed', 'prompt')
  return rows


def _with_pictures(server: Server, body: CompletionRequest) -> list[int]:
  """Ids of a prompt in which `PICTURE` stands for each picture."""
  if not isinstance(body.prompt, str):
    raise ApiError('images belong to a prompt that is one text', 'images')
  check_chars(len(body.prompt), server.most_chars, 'prompt')
  check_count(len(body.images), server.limits)
  first, *others = body.prompt.split(PICTURE)
  if len(others) != len(body.images):
    raise ApiError(
      f'{len(others)} {PICTURE} in the prompt, but {len(body.images)} images; '
      'each needs one',
      'images',
    )
  parts = [first]
  for text in others:
    parts += [None, text]
  return encode_parts(server.tokenizer, parts, server.config.adapter.queries)


def _prompt_tokens(choice: Choice) -> list[Token]:
  """Tokens of a prompt with their scores; the first one has none."""
  answer = choice.listening.answer
  tokens, scores = answer.request.tokens.tolist(), answer.prompt_scores
  if scores is None:
    return []
  top = (
    tuple(zip(ids.tolist(), logprobs.tolist()))
    for ids, logprobs in zip(scores.top_ids, scores.top_logprobs)
  )
  rest = (
    Token(token, float(logprob), best)
    for token, logprob, best in zip(tokens[1:], scores.logprobs, top)
  )
  return [*itertools.chain([Token(tokens[0])], rest)]
