"""Serving in this process."""

import contextlib
import socket
import threading
import time

import uvicorn

from qwenvl_jax.serve import web_demo
from qwenvl_jax.serve.app import make_app
from qwenvl_jax.serve.connections import uvicorn_config

KEY = 'a key for tests'


@contextlib.contextmanager
def running(server, demo=False):
  """Serves on a free port of this machine; yields the address."""
  app = make_app(server, warm_up=False)
  if demo:
    web_demo.add_demo(app, server)
  listening = socket.socket()
  listening.bind(('127.0.0.1', 0))
  http = uvicorn.Server(uvicorn_config(app, log_level='error'))
  if demo:
    web_demo.let_go(http, app)
  thread = threading.Thread(target=http.run, kwargs={'sockets': [listening]})
  thread.start()
  try:
    while not http.started:
      time.sleep(0.01)
    yield f'http://127.0.0.1:{listening.getsockname()[1]}'
  finally:
    http.should_exit = True
    thread.join()
    listening.close()
