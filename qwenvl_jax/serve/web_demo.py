"""`qwenvl-serve --demo`: a page to talk to the model in, at /demo.

gradio makes the page. It runs in the server's process and asks as any client
does (`web_demo_asking`); nothing of it is fetched from elsewhere, and nothing
is sent anywhere.
"""

import asyncio
import contextlib
import os
import pathlib
import tempfile
import time

import fastapi
import uvicorn

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.serve.limits import ApiError
from qwenvl_jax.serve.server import Server
from qwenvl_jax.serve.web_demo_gate import PATH, Gate
from qwenvl_jax.serve.web_demo_turns import EXAMPLES

# Seconds that pictures of conversations are kept, and between two looks.
_KEEP, _LOOK = 86400, 600
# Clicks that wait; the engine has a queue of its own.
_MAX_WAITING = 256


def check() -> None:
  """ConfigError if gradio is not there."""
  os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
  try:
    import gradio  # noqa: F401
  except ImportError as error:
    raise ConfigError(
      f'--demo: {error.name} is not installed; EXTRAS=dev,demo launch/env.sh, '
      'or pip install "qwenvl_jax[demo]" and then pip install --no-deps gradio '
      'gradio-client hf-gradio (gradio asks for another Pillow than it needs)'
    ) from error


def add_demo(app: fastapi.FastAPI, server: Server) -> None:
  """Adds the page to the application that `make_app` made.

  Raises:
    ConfigError: gradio is not installed.
  """
  check()
  # Of this process alone, and gone with it; gradio's own is everybody's.
  folder = tempfile.TemporaryDirectory(prefix='qwenvl-demo-')
  path = pathlib.Path(folder.name)
  os.environ['GRADIO_TEMP_DIR'] = str(path)
  import gradio

  from qwenvl_jax.serve import web_demo_page

  blocks = web_demo_page.Page(server, path).build()
  for block in blocks.blocks.values():
    block.async_move_resource_to_block_cache = _only_below(path)
  blocks.queue(max_size=_MAX_WAITING)
  gradio.mount_gradio_app(
    app,
    blocks,
    PATH,
    footer_links=[],
    run_history=False,
    show_error=False,
    allowed_paths=[],
    max_file_size=server.limits.image_bytes,
    ssr_mode=False,
    enable_monitoring=False,
    pwa=False,
    mcp_server=False,
    theme=web_demo_page.THEME,
    css=web_demo_page.CSS,
  )
  app.add_middleware(Gate, folder=path)
  app.router.lifespan_context = _with_folder(folder, app.router)


def let_go(http: uvicorn.Server, app: fastapi.FastAPI) -> None:
  """Makes open pages end when the server does, which would wait for them."""
  shutdown = http.shutdown
  (demo,) = [x.app for x in app.routes if getattr(x, 'path', '') == PATH]

  async def shut(sockets=None) -> None:
    demo.stop_event.set()
    await shutdown(sockets)

  http.shutdown = shut


def _with_folder(folder: tempfile.TemporaryDirectory, router):
  """The router's lifespan, and the folder's: signals end processes at once."""
  before = router.lifespan_context

  @contextlib.asynccontextmanager
  async def lifespan(app):
    looking = asyncio.create_task(_look_after(pathlib.Path(folder.name)))
    try:
      async with before(app) as state:
        yield state
    finally:
      looking.cancel()
      folder.cleanup()

  return lifespan


async def _look_after(folder: pathlib.Path) -> None:
  while True:
    await asyncio.sleep(_LOOK)
    await asyncio.to_thread(remove_old, folder, _KEEP)


def remove_old(folder: pathlib.Path, seconds: float) -> None:
  """Removes files that are older, but for the examples."""
  for path in folder.rglob('*'):
    old = path.is_file() and time.time() - path.stat().st_mtime > seconds
    if old and not path.is_relative_to(folder / EXAMPLES):
      path.unlink(missing_ok=True)


def _only_below(folder: pathlib.Path):
  """What gradio calls for each file that a request names.

  Mounted in another application, gradio takes any path of this machine and any
  address, which it fetches; here, what was uploaded is all there is.
  """

  async def check(path: str | pathlib.Path | None) -> str | None:
    if path is None:
      return None
    found = pathlib.Path(path).resolve()
    if not found.is_relative_to(folder.resolve()):
      raise ApiError('no such file', status=404, kind='not_found_error')
    return str(found)

  return check
