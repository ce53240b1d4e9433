"""A server on a TPU: its command, its key, and the way to it."""

from __future__ import annotations

import os
import shlex
import tempfile

from pod.cloud import Cloud
from pod.install import not_reached
from pod.log import PodError, UsageError, say, show
from pod.settings import Settings

# Where the worker keeps the key, from its checkout.
_KEY = '../api_key'
# Bytes of a file that may be one.
_KEY_BYTES = 4096


def serve_command(s: Settings) -> list[str]:
  """The words of the server's command.

  It listens on the worker's own address only, whatever the firewall allows:
  people come through ssh.
  """
  if not s.init and not s.workdir:
    raise UsageError(
      '--init DIR is missing: the checkpoint to serve (or --workdir, whose '
      'stage3 is served)'
    )
  if not 0 < s.port < 2**16:
    raise UsageError(f'--port {s.port}: 1 to 65535')
  command = [
    'qwenvl-serve',
    f'--checkpoint={s.init or s.workdir.rstrip("/") + "/stage3"}',
    f'--port={s.port}',
  ]
  if s.api_key_file:
    _read_key(s.api_key_file)
    here = os.path.abspath(s.api_key_file)
    command.append(f'--api_key_file={_KEY if s.local is None else here}')
  return command


def _read_key(path: str) -> bytes:
  try:
    with open(path, 'rb') as file:
      key = file.read(_KEY_BYTES + 1)
  except OSError as error:
    raise PodError(f'--api-key-file {path}: {error.strerror}') from error
  if not key.strip() or len(key) > _KEY_BYTES:
    raise PodError(
      f'--api-key-file {path} does not hold one key',
      'make one: (umask 077; openssl rand -hex 24 >key.txt)',
    )
  return key


def bring_key(cloud: Cloud) -> None:
  """Copies the key to the worker, where only its user can read it.

  The key is in no command line: those are seen by others, and kept in logs.
  """
  s = cloud.settings
  if not s.api_key_file:
    return
  # scp keeps the mode, so that the copy is never open to others.
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'qwenvl_api_key')
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    with open(descriptor, 'wb') as file:
      file.write(_read_key(s.api_key_file))
    answer = cloud.copy_to_workers(path)
  if not answer.status:
    answer = cloud.on_workers(
      'all', 'chmod 600 qwenvl_api_key && mv qwenvl_api_key qwenvl_jax/api_key'
    )
  if answer.status:
    not_reached(cloud, answer, 'the key could not be copied to the worker')


def tell_way(cloud: Cloud) -> None:
  """Says how to reach the server from here."""
  port = cloud.settings.port
  tunnel = cloud.tunnel(port)
  say(
    'once the log says that it is ready, on this machine, in another terminal:'
  )
  show(f'  {shlex.join(tunnel)}\n')
  say(f'then http://127.0.0.1:{port}/v1 is the server, until that ends')
