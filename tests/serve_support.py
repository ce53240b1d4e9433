"""Serving in this process."""

import contextlib
import socket
import threading
import time

import uvicorn

from qwenvl_jax.serve.app import make_app
from qwenvl_jax.serve.connections import uvicorn_config

KEY = 'a key for tests'


@contextlib.contextmanager
def running(server):
  """Serves on a free port of this machine; yields the address."""
  listening = socket.socket()
  listening.bind(('127.0.0.1', 0))
  config = uvicorn_config(make_app(server, warm_up=False), log_level='error')
  http = uvicorn.Server(config)
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
