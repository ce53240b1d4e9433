"""Asks Cloud TPU, and runs commands on the workers of a TPU.

With --dry-run, commands are printed and answered as if all went well, so that
what it prints comes from the same functions.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from typing import NamedTuple

from pod import log
from pod.log import PodError, now, pause, relay, say
from pod.settings import Settings

# Seconds that gcloud may take: for a question, to make or delete a TPU, to
# copy or install.
ASKING, CHANGING, INSTALLING = 300, 1800, 3600

# Seconds to ask again for a state that gcloud does not tell.
_ANSWER_SECONDS = 1800

# States of a TPU that is gone for good; UNKNOWN is none.
is_lost = re.compile(
  'ABSENT|PREEMPTED|TERMINATED|DELETING|STOPP(ED|ING)|HID(DEN|ING)|'
  'SUSPEND(ED|ING)|FAILED'
).fullmatch

# What no waiting mends.
_REFUSED = re.compile(
  'PERMISSION_DENIED|SERVICE_DISABLED|INVALID_ARGUMENT|has not been used|'
  'gcloud auth|credentials|required property',
  re.IGNORECASE,
)

# (kind, what gcloud says, what helps), the first that fits.
_ADVICE = (
  (
    'quota',
    'quota',
    'quota: project {project} may not have so many chips of {type} in {zone}. '
    'Ask for more at https://console.cloud.google.com/iam-admin/quotas '
    '(service tpu.googleapis.com; spot and on-demand count apart), or take a '
    'smaller --type or another --zone.',
  ),
  (
    'capacity',
    'no more capacity|stockout|RESOURCE_EXHAUSTED|insufficient|'
    'not available within|valid.until',
    'capacity: {zone} has no free {type} now. Wait (queued requests keep their '
    'place), or try another --zone, a smaller --type, --spot, or a reservation '
    '(--reserved).',
  ),
  (
    'permission',
    'has not been used|SERVICE_DISABLED',
    'the Cloud TPU API is off: gcloud services enable tpu.googleapis.com',
  ),
  (
    'permission',
    'PERMISSION_DENIED|auth login|credential|Reauthentication',
    'permission: log in with gcloud auth login, name the --project, and have '
    'the roles TPU Admin (roles/tpu.admin) and Service Account User.',
  ),
  (
    'permission',
    'ssh-add',
    'ssh: gcloud wants the key in an agent when it talks to several workers: '
    'eval "$(ssh-agent)"; ssh-add ~/.ssh/google_compute_engine',
  ),
  (
    'other',
    'INVALID_ARGUMENT|accelerator',
    'gcloud takes no such type or version here; these it has: gcloud compute '
    'tpus accelerator-types list --zone={zone}, gcloud compute tpus tpu-vm '
    'versions list --zone={zone}',
  ),
)


class Answer(NamedTuple):
  """How a command ended, and what it said."""

  status: int
  out: str = ''
  err: str = ''


class Cloud:
  """gcloud, about one TPU.

  Attributes:
    settings: with the TPU's name, zone and so on.
    dry: whether commands are only printed.
  """

  def __init__(self, settings: Settings):
    self.settings = settings
    self.dry = settings.dry_run
    # What gcloud said when it did not tell a state.
    self.refusal = ''

  def check(self) -> None:
    if not self.dry and not shutil.which('gcloud'):
      raise PodError(
        'gcloud is not installed',
        'https://cloud.google.com/sdk/docs/install, then: gcloud auth login',
        '(--dry-run and --local work without it)',
      )

  def _command(self, words) -> list[str] | None:
    """The whole command; None if it was only printed."""
    command = ['gcloud', *words, *self._of_tpu(), '--quiet']
    if not self.dry:
      return command
    log.show(shlex.join(command) + '\n')
    return None

  def _of_tpu(self) -> list[str]:
    s = self.settings
    return [
      f'--zone={s.zone}',
      *([f'--project={s.project}'] if s.project else []),
    ]

  def call(self, *words: str, limit: float = ASKING) -> Answer:
    """Runs gcloud to its end, or for `limit` seconds."""
    command = self._command(words)
    return run(command, limit) if command else Answer(0)

  def _state(self, kind: str, fields: str, if_dry: str) -> str:
    """Fields of a description; ABSENT, or UNKNOWN if one cannot tell now."""
    answer = self.call(
      *('compute', 'tpus', kind, 'describe', self.settings.tpu),
      f'--format={fields}',
    )
    if self.dry:
      return if_dry
    if not answer.status:
      return answer.out.rstrip('\n') or 'UNKNOWN'
    self.refusal = answer.err
    gone = re.search('NOT_FOUND|not found|notFound', answer.err)
    return 'ABSENT' if gone else 'UNKNOWN'

  def queue_state(self, if_dry: str = 'ACTIVE') -> tuple[str, str]:
    """State of the queued resource and, if it failed, the reason."""
    fields = 'value(state.state,state.failedData.error.message)'
    answer = self._state('queued-resources', fields, if_dry)
    state, _, reason = answer.partition('\t')
    return state, reason

  def tpu_state(self, if_dry: str = 'READY') -> str:
    """State of the TPU itself."""
    return self._state('tpu-vm', 'value(state)', if_dry)

  def certain(self, ask, *arguments):
    """A state as `ask` tells it, but not UNKNOWN; tries for half an hour."""
    since, told = now(), False
    while now() - since < _ANSWER_SECONDS:
      answer = ask(*arguments)
      if 'UNKNOWN' not in (answer, answer[0]):
        return answer
      if _REFUSED.search(self.refusal):
        break
      if not told:
        said = self.refusal.strip() or 'gcloud says nothing'
        say(f'no answer, trying again: {said.splitlines()[-1]}')
      told = True
      pause(15)
    self.explain(self.refusal)
    raise PodError(f'the state of TPU {self.settings.tpu} cannot be found out')

  def _connect(self, verb: str, *words: str) -> list[str]:
    """Words of gcloud's ssh or scp, as --ssh says.

    Only the alpha commands go through the Identity-Aware Proxy, and know groups
    of workers: more than a hundred connections at once are prone to fail.
    """
    alpha, ways = [], []
    if self.settings.ssh == 'internal':
      ways = ['--internal-ip']
    elif self.settings.ssh == 'iap':
      alpha, ways = ['alpha'], ['--tunnel-through-iap']
    if self.settings.chips > 400:
      alpha, ways = ['alpha'], [*ways, '--batch-size=100']
    return [*alpha, 'compute', 'tpus', 'tpu-vm', verb, *words, *ways]

  def _on_workers(self, which, command: str) -> list[str]:
    # A connection that went silent ends after two minutes.
    return self._connect(
      *('ssh', self.settings.tpu, f'--worker={which}'),
      '--ssh-flag=-oServerAliveInterval=30',
      '--ssh-flag=-oServerAliveCountMax=4',
      f'--command={command}',
    )

  def on_workers(self, which, command: str, limit: float = ASKING) -> Answer:
    """Runs a command line on one worker, or `all`."""
    return self.call(*self._on_workers(which, command), limit=limit)

  def stream(self, which, command: str, copy: str | None = None) -> Stream:
    """As `on_workers`, but what it says is printed while it runs."""
    return Stream(self._command(self._on_workers(which, command)), copy)

  def tunnel(self, port: int) -> list[str]:
    """The command that brings a port of worker 0 to this machine."""
    ssh = self._connect('ssh', self.settings.tpu, '--worker=0')
    way = f'--ssh-flag=-N -L 127.0.0.1:{port}:127.0.0.1:{port}'
    return ['gcloud', *ssh, way, *self._of_tpu()]

  def copy_to_workers(self, file: str) -> Answer:
    target = f'{self.settings.tpu}:{os.path.basename(file)}'
    words = self._connect('scp', file, target, '--worker=all')
    return self.call(*words, limit=INSTALLING)

  def explain(self, text: str) -> str:
    """Says what an error of gcloud means and what helps.

    Returns:
      Its kind: quota, capacity, permission or other.
    """
    relay(text)
    for kind, pattern, advice in _ADVICE:
      if re.search(pattern, text, re.IGNORECASE):
        s = self.settings
        project, what = s.project or '(the default)', s.type or 'this type'
        say(advice.format(project=project, type=what, zone=s.zone))
        return kind
    return 'other'


def worker(*words) -> str:
  """The command line of the worker's own script."""
  script = 'qwenvl_jax/checkout/launch/pod/worker.py'
  return shlex.join(['python3', script, *map(str, words)])


def run(command: list[str], limit: float) -> Answer:
  """Runs a command to its end, or for `limit` seconds."""
  # Into files: what a killed command started may hold a pipe open.
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    process = subprocess.Popen(
      command, stdin=subprocess.DEVNULL, stdout=out, stderr=err
    )
    late = ''
    try:
      status = process.wait(limit)
    except subprocess.TimeoutExpired:
      status = 124
      late = f'{command[0]} did not answer within {limit:g} s\n'
    finally:
      if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(5)
        process.kill()
        process.wait()
    return Answer(status, _text(out), _text(err) + late)


def _text(file) -> str:
  file.seek(0)
  return file.read().decode(errors='replace')


class Stream:
  """A command whose output is printed while it runs.

  Attributes:
    error: what it says on stderr, once it has ended.
  """

  def __init__(self, command: list[str] | None, copy: str | None = None):
    """Starts it.

    Args:
      command: None for one that has ended well.
      copy: file that its output is added to, as it is.
    """
    self.error = ''
    self._process = None
    if command is None:
      return
    self._copy = open(copy or os.devnull, 'ab')  # noqa: SIM115
    self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
    # A process group of its own, so that it is ended with what it runs.
    self._process = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=self._stderr,
      start_new_session=True,
    )
    # A terminal that is stopped holds up this thread only.
    self._thread = threading.Thread(target=self._print, daemon=True)
    self._thread.start()

  def _print(self) -> None:
    decoder = log.decoder()
    shown = kept = True
    while data := os.read(self._process.stdout.fileno(), 2**16):
      if kept:
        try:
          self._copy.write(data)
          self._copy.flush()
        except OSError as error:
          kept = False
          say(f'the log is no longer kept here: {error}')
      if shown and not log.show(decoder.decode(data)):
        shown = False
        say('nobody reads the log here any more; the supervision goes on')

  def running(self) -> bool:
    return self._process is not None and self._process.poll() is None

  def finish(self, limit: float | None = None) -> int:
    """Waits until it has ended; ends it after `limit` seconds.

    Returns:
      Its exit status.
    """
    if self._process is None:
      return 0
    for seconds, signum in ((limit, signal.SIGTERM), (5, signal.SIGKILL)):
      try:
        self._process.wait(seconds)
        break
      except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
          os.killpg(self._process.pid, signum)
    status = self._process.wait()
    self._thread.join(5)
    self.error = _text(self._stderr)
    return status
