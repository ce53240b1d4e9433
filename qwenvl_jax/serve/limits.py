"""What one request may ask for, and the errors that say so."""

import dataclasses
import pathlib

from starlette.exceptions import HTTPException

# Formats that pictures may have: Pillow opens no others, whatever it could do.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')


@dataclasses.dataclass(frozen=True)
class Limits:
  """Budgets of one request.

  Attributes:
    body_bytes: of the whole body.
    bodies_bytes: of the bodies of all requests that are being answered.
    images: pictures of all messages together.
    image_bytes: of one encoded picture.
    image_pixels: of all pictures together, before they are resized.
    messages: of a conversation.
    choices: answers to one prompt (`n`), and prompts times `n`.
    stops: stop texts.
    stop_chars: of one stop text.
    media_folder: `file:` pictures are read from here; None for nowhere.
    media_domains: hosts that http(s) pictures are fetched from.
    fetch_seconds: that fetching one picture may take.
    seconds: after which an answer ends as it is.
  """

  body_bytes: int = 32 * 2**20
  bodies_bytes: int = 2**30
  images: int = 16
  image_bytes: int = 16 * 2**20
  image_pixels: int = 64_000_000
  messages: int = 512
  choices: int = 16
  stops: int = 4
  stop_chars: int = 256
  media_folder: pathlib.Path | None = None
  media_domains: tuple[str, ...] = ()
  fetch_seconds: float = 10.0
  seconds: float = 600.0


class ApiError(HTTPException):
  """An answer that is an error, in OpenAI's form.

  It is an HTTPException, which FastAPI lets through where a body is read.

  Attributes:
    status: of HTTP.
    kind: OpenAI's `type`.
    param: the field that is wrong, None for none.
    code: OpenAI's `code`, None for none.
    headers: of the answer.
  """

  def __init__(
    self,
    message: str,
    param: str | None = None,
    *,
    status: int = 400,
    kind: str = 'invalid_request_error',
    code: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(status, message, headers)
    self.status, self.kind, self.param = status, kind, param
    self.code = code

  def __str__(self) -> str:
    return self.detail

  def body(self) -> dict:
    """The JSON of the answer."""
    return {
      'error': {
        'message': self.detail,
        'type': self.kind,
        'param': self.param,
        'code': self.code,
      }
    }


def busy() -> ApiError:
  """The error of a request that came while too much was asked for."""
  return ApiError(
    'the server is busy; try again later',
    status=429,
    kind='rate_limit_error',
    code='rate_limit_exceeded',
    headers={'Retry-After': '1'},
  )
