"""What notebooks need: a folder that stays, commands, pictures, curves.

`launch/colab/` stands on it. Pictures are PIL images, which notebooks show by
themselves.
"""

import importlib.metadata
import importlib.util
import io
import os
import random
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from qwenvl_jax import buckets, image
from qwenvl_jax.data.builders import compose
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError
from qwenvl_jax.eval import curves as drawn_curves
from qwenvl_jax.text import drawing

# Where Colab mounts Google Drive.
_DRIVE = '/content/drive'

# A picture from the web may take so many bytes and seconds.
_PICTURE_BYTES = 32 * 2**20
_SECONDS = 30


def keep(folder: str) -> Path:
  """Makes the folder where work is kept, on Colab beyond the session.

  Args:
    folder: a folder of this machine, one in Google Drive
      (`/content/drive/MyDrive/..`, mounted on first use), or one in a bucket
      (`gs://..`, signed in to on first use).

  Returns:
    Its path.

  Raises:
    ConfigError: Drive is asked for outside of Colab, or a bucket cannot be
      opened.
  """
  colab = importlib.util.find_spec('google.colab') is not None
  if folder.startswith(_DRIVE) and not Path(_DRIVE, 'MyDrive').is_dir():
    if not colab:
      raise ConfigError(f'{folder}: Google Drive is mounted on Colab only')
    from google.colab import drive

    drive.mount(_DRIVE)
  if buckets.in_bucket(folder) and colab:
    from google.colab import auth

    auth.authenticate_user()
  path = buckets.as_path(folder)
  buckets.make_folder(path)
  return path


def run(command: str, *arguments: object) -> None:
  """Runs a command in a process of its own and shows what it says.

  Unlike `!`, it ends the notebook where the command fails. A process of its own
  gives back the accelerator at its end. Interrupting the cell interrupts the
  command, which saves its work as on Ctrl-C.

  Args:
    command: one of the package's (`qwenvl-train`) or a module of it.
    *arguments: as on the command line.

  Raises:
    ConfigError: there is no such command.
    QwenVLError: it failed; it has said why.
  """
  words = list(map(str, arguments))
  scripts = importlib.metadata.entry_points(group='console_scripts')
  if command in scripts.names:
    shown, module = [command, *words], scripts[command].module
  elif command.startswith('qwenvl_jax.'):
    shown, module = ['python', '-m', command, *words], command
  else:
    raise ConfigError(f'{command} is no command of qwenvl_jax')
  print(f'$ {shlex.join(shown)}', flush=True)
  # Kernels force colours on what they start, which would draw bars for a
  # terminal that is not there.
  environment = {k: v for k, v in os.environ.items() if k != 'FORCE_COLOR'}
  process = subprocess.Popen(
    [sys.executable, '-m', module, *words],
    env=environment | {'PYTHONUNBUFFERED': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors='replace',
  )
  try:
    _show_output(process)
  except KeyboardInterrupt:
    process.send_signal(signal.SIGINT)
    _show_output(process)
    raise
  if process.returncode:
    raise QwenVLError(
      f'{command} failed with status {process.returncode}, see above'
    )


def _show_output(process: subprocess.Popen) -> None:
  for line in process.stdout:
    print(line, end='', flush=True)
  process.wait()


def picture(source: str = '', seed: int = 0) -> Image.Image:
  """Opens a picture to ask about.

  Args:
    source: a path, an address (`https://..`), or '' for a composed scene.
    seed: of the scene.

  Raises:
    DataError: no such file or address, or no picture.
  """
  if not source:
    drawn = compose.compose(random.Random(seed), compose.Style())
    return drawn.image
  if not source.startswith(('https://', 'http://')):
    return image.load(source)
  request = urllib.request.Request(source, headers={'User-Agent': 'qwenvl_jax'})
  try:
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
      data = answer.read(_PICTURE_BYTES + 1)
  except (OSError, urllib.error.URLError, ValueError) as error:
    raise DataError(f'{source} cannot be fetched: {error}') from error
  if len(data) > _PICTURE_BYTES:
    raise DataError(f'{source} has more than {_PICTURE_BYTES} bytes')
  return image.load(data, source)


def boxes(shown: Image.Image, answer: str) -> Image.Image:
  """Draws the boxes of an answer on its picture, if it has any."""
  return drawing.draw(shown, answer)[0]


def curves(runs: Mapping[str, Path]) -> Image.Image:
  """Draws the loss of runs (title to folder) as far as they are."""
  file = io.BytesIO()
  drawn_curves.draw(runs).savefig(file, format='png', dpi=100)
  return Image.open(file)
