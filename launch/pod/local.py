"""A stage as several processes of this machine.

Virtual CPU devices and gloo stand in for chips and their links.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

from pod import log
from pod.cloud import Stream
from pod.log import PodError, UsageError, relay, say
from pod.settings import ROOT, Settings

# How long the others may take to end once one process has died: they cannot
# save without it.
_GRACE_SECONDS = 10

_MODULES = {
  'qwenvl-train': 'train.main',
  'qwenvl-eval': 'eval.main',
  'qwenvl-serve': 'serve.main',
}


def run_local(s: Settings, name: str, command: list[str]) -> int:
  """Runs a stage in s.local processes; returns the exit status."""
  if s.local < 1:
    raise UsageError('--local needs one process or more')
  if s.devices_per_process < 1:
    raise UsageError('--devices-per-process: one or more')
  command = [*_program(command[0], s.dry_run), *command[1:], *s.extra]
  stamp = time.strftime('%Y%m%dT%H%M%S', time.gmtime())
  folder = f'{s.state}/local/{name}-{stamp}-{os.getpid()}'
  worker = os.path.join(ROOT, 'launch/pod/worker.py')
  common = {
    'QWENVL_COORDINATOR': f'127.0.0.1:{"PORT" if s.dry_run else _free_port()}',
    'QWENVL_NUM_PROCESSES': str(s.local),
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(s.devices_per_process),
    # As launch/env.sh has it: large arrays in huge pages.
    'GLIBC_TUNABLES': os.environ.get('GLIBC_TUNABLES')
    or 'glibc.malloc.hugetlb=1',
  }
  processes = []
  for index in range(s.local):
    variables = {
      **common,
      'QWENVL_PROCESS_ID': str(index),
      'QWENVL_POD_HOME': f'{folder}/worker{index}',
    }
    words = [sys.executable, worker, 'run', name, *command]
    if s.dry_run:
      values = [f'{key}={value}' for key, value in variables.items()]
      log.show(shlex.join(['env', *values, *words]) + '\n')
      continue
    # Apart from the terminal's process group, so that Ctrl-C reaches them only
    # through us, and once.
    process = subprocess.Popen(
      words,
      env={**os.environ, **variables},
      stdin=subprocess.DEVNULL,
      start_new_session=True,
    )
    processes.append(process)
  if s.dry_run:
    return 0
  say(
    f'{s.local} processes with {s.devices_per_process} devices each: '
    + shlex.join(command)
  )
  status = _Crowd(processes, folder).follow()
  if not status:
    say(f'{name} is finished on all {s.local} processes: {s.workdir or ""}')
  return status


def _program(command: str, dry: bool) -> list[str]:
  """The program in the environment that is there; makes one if none is."""
  # Tests name the interpreter that they run in.
  python = os.environ.get('QWENVL_POD_PYTHON')
  if python:
    return [python, '-m', f'qwenvl_jax.{_MODULES[command]}']
  ours = os.path.join(ROOT, '.venv/bin', command)
  found = ours if os.path.exists(ours) else shutil.which(command)
  if not found:
    made = dry or not subprocess.run([f'{ROOT}/launch/env.sh']).returncode
    if not made:
      raise PodError(f'there is no environment with {command}')
    found = ours
  return [found]


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


class _Crowd:
  """Processes of which none can go on without the others."""

  def __init__(self, processes: list[subprocess.Popen], folder: str):
    self._processes = processes
    self._folder = folder
    self._signals: list[int] = []

  def _log(self, index: int) -> str:
    return f'{self._folder}/worker{index}/job/log'

  def follow(self) -> int:
    """Prints worker 0's log until all have ended; returns the exit status."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      signal.signal(signum, self._forward)
    say(f"logs: {self._folder}/worker*/job/log; worker 0's:")
    path, pid = self._log(0), self._processes[0].pid
    # Until that process has ended; the file is not there yet.
    how = ['-n', '+1', '-s', '0.2', '-F', f'--pid={pid}']
    tail = Stream(['tail', *how, path])
    first = lost_since = None
    codes: dict[int, int] = {}
    while len(codes) < len(self._processes):
      for index, process in enumerate(self._processes):
        code = process.poll()
        if index in codes or code is None:
          continue
        codes[index] = code = code if code >= 0 else 128 - code
        if not code or self._signals:
          continue
        lost_since = lost_since or time.monotonic()
        # 75 says that another was lost: that one comes to light, too.
        if first is None and code != 75:
          first = index
          self._tell_dead(index, code)
          if len(codes) < len(self._processes):
            say('the others cannot go on without it')
          self._signal_all(signal.SIGTERM)
      late = lost_since and time.monotonic() - lost_since >= _GRACE_SECONDS
      if late or len(self._signals) > 1:
        self._signal_all(signal.SIGKILL)
      time.sleep(0.1)
    tail.finish(5)
    if first is not None:
      return codes[first]
    if lost_since:
      raise PodError('a process was lost: see the logs')
    return 128 + self._signals[-1] if any(codes.values()) else 0

  def _tell_dead(self, index: int, code: int) -> None:
    why = f'exit status {code}'
    if code > 128:
      with contextlib.suppress(ValueError):
        why = f'signal {signal.Signals(code - 128).name[3:]}'
    say(f'worker {index} died ({why}); the end of its log:')
    with contextlib.suppress(OSError), open(self._log(index), 'rb') as file:
      file.seek(max(0, os.path.getsize(self._log(index)) - 2**16))
      lines = file.read().decode(errors='replace').splitlines()[-15:]
      relay('\n'.join(lines), f'worker {index}: ')

  def _forward(self, signum, frame) -> None:
    self._signals.append(signum)
    if len(self._signals) == 1:
      say('stopping all processes, which save; once more ends them at once')
      self._signal_all(signal.SIGTERM)

  def _signal_all(self, signum: int) -> None:
    # TERM goes to worker.py, which passes it on; KILL to all that it started.
    send = os.killpg if signum == signal.SIGKILL else os.kill
    for process in self._processes:
      if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
          send(process.pid, signum)
