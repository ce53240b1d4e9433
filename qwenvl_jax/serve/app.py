"""The routes, and what guards them."""

import asyncio
import contextlib
import functools
import importlib.metadata
import re
import uuid
from collections.abc import AsyncIterator

import fastapi
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException

from qwenvl_jax.serve import chats, completions, replies
from qwenvl_jax.serve.conversation import encode
from qwenvl_jax.serve.limits import ApiError, busy
from qwenvl_jax.serve.schemas import (
  ChatRequest,
  CompletionRequest,
  DetokenizeRequest,
  TokenizeRequest,
)
from qwenvl_jax.serve.server import Server, finish

# Routes that need no key.
OPEN = ('/health', '/ready')
# How a client may name its request.
_NAME = re.compile(r'[\w.-]{1,64}', re.ASCII)

_DESCRIPTION = """\
Qwen-VL behind OpenAI's API. Pictures come as `image_url` parts (data URLs, and
what the operator allows), are numbered `Picture 1`, `Picture 2`, .. through a
conversation, and answers name places in thousandths of the last picture,
`<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>`; `boxes` beside `content` has them
in pixels.

With a key, requests send `Authorization: Bearer KEY`. Every answer has an
`x-request-id`, that of the request if it has one.
"""

_CHAT = replies.streamed(
  replies.ChatCompletion,
  '{"id": "chatcmpl-5d2f", "object": "chat.completion.chunk", "created": '
  '1764338400, "model": "stage3", "choices": [{"index": 0, "delta": {"content":'
  ' "A dog"}, "logprobs": null, "finish_reason": null}]}',
)
_COMPLETION = replies.streamed(
  replies.TextCompletion,
  '{"id": "cmpl-5d2f", "object": "text_completion", "created": 1764338400, '
  '"model": "stage3", "choices": [{"index": 0, "text": " dog", "logprobs": '
  'null, "finish_reason": null}]}',
)
# Routes that say how the server is by their status alone.
_PROBE = {
  'tags': ['server'],
  'response_class': Response,
  'responses': {503: {'description': 'Not (yet).'}},
  'openapi_extra': {'security': []},
}


def make_app(server: Server, warm_up: bool = True) -> fastapi.FastAPI:
  """Makes the ASGI application of a server.

  Args:
    server: what answers; its worker is started and stopped with the app.
    warm_up: whether everything is compiled before `/ready` says so.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app) -> AsyncIterator[None]:
    del app
    server.worker.start(warm_up)
    yield
    server.worker.stop()

  app = fastapi.FastAPI(
    title='qwenvl_jax',
    description=_DESCRIPTION,
    version=importlib.metadata.version('qwenvl_jax'),
    lifespan=lifespan,
    responses=replies.ERRORS,
    # What it checks is `_Guard`'s matter; here it tells /docs of the key.
    dependencies=[fastapi.Depends(HTTPBearer(auto_error=False))],
  )
  _guard(app, server)
  _operations(app, server)
  _inference(app, server)
  return app


def _inference(app: fastapi.FastAPI, server: Server) -> None:
  @app.post(
    '/v1/chat/completions',
    tags=['answers'],
    responses=replies.ANSWER_ERRORS | {200: _CHAT},
  )
  async def chat_completions(body: ChatRequest, request: Request):
    """Answers a conversation, whole or as server-sent events."""
    wait = functools.partial(finish, gone=request.is_disconnected)
    return await chats.chat(server, body, request.state.salt, wait)

  @app.post(
    '/v1/completions',
    tags=['answers'],
    responses=replies.ANSWER_ERRORS | {200: _COMPLETION},
  )
  async def text_completions(body: CompletionRequest, request: Request):
    """Continues prompts; with echo and logprobs, scores them."""
    wait = functools.partial(finish, gone=request.is_disconnected)
    return await completions.complete(server, body, request.state.salt, wait)

  @app.post('/tokenize', tags=['tokens'], responses=replies.BODY_ERRORS)
  async def tokenize(body: TokenizeRequest) -> replies.Tokens:
    """Ids of a text or of a conversation."""
    server.find_model(body.model)
    if (body.prompt is None) == (not body.messages):
      raise ApiError('either prompt or messages is needed', 'prompt')
    if body.prompt is None:
      tokens = (await asyncio.to_thread(server.prompt, body)).tokens
    else:
      tokens = await asyncio.to_thread(encode, server.tokenizer, body.prompt)
    return replies.Tokens(
      count=len(tokens), max_model_len=server.max_len, tokens=tokens
    )

  @app.post('/detokenize', tags=['tokens'], responses=replies.BODY_ERRORS)
  async def detokenize(body: DetokenizeRequest) -> replies.Text:
    """The text of ids."""
    server.find_model(body.model)
    return replies.Text(prompt=server.tokenizer.decode(body.tokens))


def _operations(app: fastapi.FastAPI, server: Server) -> None:
  @app.get('/v1/models', tags=['server'])
  async def models() -> replies.Models:
    """The models that are served: the checkpoint, then its adapters."""
    return replies.Models(object='list', data=server.models)

  @app.get(
    '/v1/models/{name:path}',
    tags=['server'],
    responses={404: replies.BODY_ERRORS[404]},
  )
  async def model(name: str) -> replies.Model:
    """One of them."""
    return server.find_model(name)

  @app.get('/health', **_PROBE)
  async def health():
    """Status 200 while the engine runs."""
    return Response(status_code=200 if server.worker.alive else 503)

  @app.get('/ready', **_PROBE)
  async def ready():
    """Status 200 once everything is compiled."""
    fine = server.worker.alive and server.worker.ready
    return Response(status_code=200 if fine else 503)

  @app.get('/version', tags=['server'])
  async def version() -> replies.Version:
    """Version of the package."""
    return replies.Version(version=app.version)

  @app.get('/metrics', tags=['server'], response_class=PlainTextResponse)
  async def metrics():
    """Counters in Prometheus' format, under vLLM's names."""
    return PlainTextResponse(server.metrics.text())


def _guard(app: fastapi.FastAPI, server: Server) -> None:
  def refused(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)

  @app.exception_handler(ApiError)
  async def api_error(request, error):
    del request
    return refused(error)

  @app.exception_handler(RequestValidationError)
  async def invalid(request, error):
    del request
    first = error.errors()[0]
    if first['type'] == 'json_invalid':
      return refused(
        ApiError(f'the body is no JSON from character {first["loc"][-1]} on')
      )
    if first['loc'] == ('body',):
      return refused(
        ApiError(
          'the body is no JSON object, or was sent without the header '
          'Content-Type: application/json'
        )
      )
    place = '.'.join(map(str, first['loc'][1:])) or 'body'
    return refused(ApiError(f'{place}: {first["msg"]}'[:500], place[:200]))

  @app.exception_handler(HTTPException)
  async def http_error(request, error):
    del request
    status = error.status_code
    kind = f'{"invalid_request" if status == 400 else "not_found"}_error'
    return refused(
      ApiError(error.detail, status=status, kind=kind, headers=error.headers)
    )

  @app.exception_handler(Exception)
  async def unknown(request, error):
    # The server's log has the trace; the client learns nothing of it.
    del request, error
    return refused(
      ApiError('the server failed', status=500, kind='server_error')
    )

  app.add_middleware(_Guard, server=server)


class _Guard:
  """Checks the key and the size of bodies, and names requests."""

  def __init__(self, app, server: Server):
    self._app, self._server = app, server
    # Of the bodies of all requests that are being answered.
    self._bytes = 0

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      return await self._app(scope, receive, send)
    request = Request(scope)
    send = _naming(send, request.headers.get('x-request-id', ''))
    got = 0

    async def counted():
      nonlocal got
      message = await receive()
      size = len(message.get('body', b''))
      got, self._bytes = got + size, self._bytes + size
      self._check_length(got)
      if self._bytes > self._server.limits.bodies_bytes:
        raise busy()
      return message

    try:
      salt = b''
      if scope['path'] not in OPEN:
        salt = self._server.check_key(request.headers.get('authorization'))
      scope.setdefault('state', {})['salt'] = salt
      length = request.headers.get('content-length', '')
      # What is announced may be refused at once, and need not be true.
      self._check_length(int(length) if length.isdecimal() else 0)
      return await self._app(scope, counted, send)
    except ApiError as error:
      response = JSONResponse(error.body(), error.status, error.headers)
      return await response(scope, receive, send)
    finally:
      self._bytes -= got

  def _check_length(self, length: int) -> None:
    most = self._server.limits.body_bytes
    if length > most:
      raise ApiError(f'the body has more than {most:,} bytes', status=413)


def _naming(send, name: str):
  """`send` that names the request, as its client did or anew."""
  named = name if _NAME.fullmatch(name) else uuid.uuid4().hex

  async def sending(message):
    if message['type'] == 'http.response.start':
      MutableHeaders(scope=message)['x-request-id'] = named
    await send(message)

  return sending
