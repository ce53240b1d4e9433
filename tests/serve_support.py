"""Serving in this process, and by the command in one of its own."""

import contextlib
import io
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn
from PIL import Image

from qwenvl_jax.serve import web_demo
from qwenvl_jax.serve.app import make_app
from qwenvl_jax.serve.connections import uvicorn_config

KEY = 'a key for tests'


@contextlib.contextmanager
def running(server, warm_up=False, demo=False):
  """Serves on a free port of this machine; yields the address once ready."""
  app = make_app(server, warm_up)
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
    while not (http.started and server.worker.ready):
      time.sleep(0.01)
    yield f'http://127.0.0.1:{listening.getsockname()[1]}'
  finally:
    http.should_exit = True
    thread.join()
    listening.close()


@contextlib.contextmanager
def command(folder, *arguments) -> Iterator[tuple[subprocess.Popen, int]]:
  """`qwenvl-serve` of a checkpoint; yields its process and port once ready."""
  process = subprocess.Popen(
    [
      *(sys.executable, '-m', 'qwenvl_jax.serve.main', '--port=0'),
      *(f'--checkpoint={folder}', *arguments),
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    said = process.stdout.readline()
    found = re.search(r'at https?://127\.0\.0\.1:(\d+)/v1', said)
    assert found, said
    assert process.stdout.readline().startswith('ready: ')
    yield process, int(found[1])
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def key_file(folder) -> tuple[str, str]:
  """(a key, the argument that names its file)."""
  key, path = KEY.replace(' ', '-'), pathlib.Path(folder) / 'key'
  path.write_text(f'{key}\n', encoding='utf-8')
  return key, f'--api_key_file={path}'


def encoded(size=(64, 48), kind='PNG', colour=(200, 200, 200)):
  """Bytes of a picture in one colour."""
  file = io.BytesIO()
  Image.new('RGB', size, colour).save(file, kind)
  return file.getvalue()
