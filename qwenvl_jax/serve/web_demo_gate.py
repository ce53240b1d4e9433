"""What of the web demo may be reached, and by whom.

gradio has many routes: it fetches addresses that a request names, edits its own
program, keeps files for other sites. The page needs a few of them; the others
are not there. Browsers send the server's key by HTTP's Basic scheme, and the
server's own check looks at it.
"""

import base64
import binascii
import pathlib
import re
import urllib.parse

from fastapi.responses import JSONResponse, RedirectResponse
from starlette.datastructures import Headers, MutableHeaders

from qwenvl_jax.serve.limits import ApiError

# Where the page is.
PATH = '/demo'
# (method, path after PATH) that the page asks for.
_ROUTES = re.compile(
  r'GET (/|/(theme\.css|config)|/(assets|static)/.*'
  r'|/gradio_api/(queue/data|upload_progress|heartbeat/\w+|file=.*))'
  r'|POST /gradio_api/(upload|queue/join|cancel|reset)',
  re.ASCII | re.DOTALL,
)
_FILE = '/gradio_api/file='
# Whatever a page, a picture or an answer says: nothing is asked of others.
_POLICY = (
  "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
  "form-action 'self'; frame-ancestors 'self'; base-uri 'self'"
)


class Gate:
  """ASGI middleware before everything else of the server."""

  def __init__(self, app, folder: pathlib.Path):
    """Makes it."""
    self._app, self._folder = app, folder.resolve()

  async def __call__(self, scope, receive, send):
    path = scope.get('path', '')
    if scope['type'] != 'http':
      return await self._app(scope, receive, send)
    if path in ('/', PATH):
      response = RedirectResponse(f'{PATH}/')
      return await response(scope, receive, send)
    if not path.startswith(f'{PATH}/'):
      return await self._app(scope, receive, send)
    send = _answering(send)
    headers = Headers(scope=scope)
    try:
      self._check_route(scope['method'], path.removeprefix(PATH))
      _check_origin(headers)
    except ApiError as error:
      response = JSONResponse(error.body(), error.status)
      return await response(scope, receive, send)
    key = _basic_key(headers.get('authorization', ''))
    if key is not None:
      changed = MutableHeaders(raw=[*scope['headers']])
      changed['authorization'] = f'Bearer {key}'
      scope = scope | {'headers': changed.raw}
    return await self._app(scope, receive, send)

  def _check_route(self, method: str, path: str) -> None:
    method = 'GET' if method == 'HEAD' else method
    fine = _ROUTES.fullmatch(f'{method} {path}')
    if fine and path.startswith(_FILE):
      file = pathlib.Path(path.removeprefix(_FILE))
      try:
        fine = file.resolve().is_relative_to(self._folder)
      except (OSError, ValueError):
        fine = False
    if not fine:
      raise ApiError('Not Found', status=404, kind='not_found_error')


def _check_origin(headers: Headers) -> None:
  """ApiError if the page of another site asks: browsers add the key for it."""
  origin = headers.get('origin')
  if origin and urllib.parse.urlsplit(origin).netloc != headers.get('host'):
    raise ApiError(
      'the demo answers its own page only', status=403, kind='permission_error'
    )


def _basic_key(header: str) -> str | None:
  """The password of a Basic header, None if it is none."""
  scheme, _, packed = header.partition(' ')
  if scheme.lower() != 'basic':
    return None
  try:
    return base64.b64decode(packed).decode().partition(':')[2]
  except (binascii.Error, UnicodeDecodeError):
    return None


def _answering(send):
  async def sending(message):
    if message['type'] == 'http.response.start':
      headers = MutableHeaders(scope=message)
      headers['content-security-policy'] = _POLICY
      headers['referrer-policy'] = 'no-referrer'
      headers['x-content-type-options'] = 'nosniff'
      if message['status'] == 401:
        # The browser asks for it; any name will do.
        headers['www-authenticate'] = 'Basic realm="API key", charset="UTF-8"'
    await send(message)

  return sending
