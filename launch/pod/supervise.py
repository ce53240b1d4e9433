"""Keeps a stage going until it is done."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import socket
import time

from pod.cloud import Cloud, worker
from pod.create import RetryLater, bring_up, remove_request, take_down
from pod.install import install_everywhere
from pod.log import (
  PodError,
  duration,
  now,
  pause,
  read_file,
  relay,
  say,
  write_file,
)
from pod.serve import bring_key, tell_way
from pod.stage import ONE_HOST
from pod.watch import start_everywhere, watch_stage

# Ended by their own limit or by hand, apart from failures (1).
_LIMIT, _STOPPED = 3, 143

_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Budget:
  """Seconds of the TPU that a stage has used, over all calls of this script."""

  def __init__(self, cloud: Cloud, stage: str):
    """Reads what was used before, and checks that it can be written.

    Raises:
      PodError: the file is damaged or cannot be written: nothing may be paid
        for without being counted.
    """
    self.path = os.path.join(cloud.settings.folder, f'spent-{stage}')
    self._hours = cloud.settings.budget
    self._dry = cloud.dry
    text = read_file(self.path).strip() if os.path.exists(self.path) else '0'
    if not re.fullmatch('[0-9]{1,12}', text):
      raise PodError(
        f'{self.path} holds {text[:40]!r}, not the seconds that the TPU was '
        f'used for {stage}',
        'write them there (3600 for each hour), or remove the file to count '
        'from 0',
      )
    self._seconds = float(text)
    try:
      self._write()
    except OSError as error:
      raise PodError(
        f'what the TPU is used for cannot be written: {error}',
        'make room, or name another folder with --state',
      ) from error

  def _write(self) -> None:
    if not self._dry:
      write_file(self.path, f'{self._seconds:.0f}\n')

  def start(self) -> None:
    """Counts from now on."""
    self._since = now()

  def charge(self) -> None:
    """Counts the time since the last charge, or start."""
    time = now()
    self._seconds += max(0, time - self._since)
    self._since = time
    try:
      self._write()
    except OSError as error:
      # It is counted here all the same, and written when there is room.
      say(f'warning: {self.path} cannot be written: {error}')

  def used_up(self) -> bool:
    return bool(self._hours) and self._seconds >= float(self._hours) * 3600

  def __str__(self):
    of = f' of {self._hours}' if self._hours else ''
    return f'{self._seconds / 3600:.1f}{of} TPU hours'


class Lock:
  """Held by the process that looks after a TPU; a dead one holds nothing.

  Two of these would make the same TPU anew at once.
  """

  def __init__(self, cloud: Cloud):
    self._path = os.path.join(cloud.settings.folder, 'lock')
    self._tpu = cloud.settings.tpu
    self._file = None

  def holder(self) -> tuple[bool, str]:
    """Whether a living process holds it, and who does or last did."""
    who = read_file(self._path).strip()
    if not who:
      return False, ''
    with open(self._path) as file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except OSError:
        return True, who
    return False, who

  def take(self, stage: str) -> None:
    os.makedirs(os.path.dirname(self._path), exist_ok=True)
    self._file = open(self._path, 'a')  # noqa: SIM115
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      who = read_file(self._path).strip()
      raise PodError(
        f'another tpu_pod.sh looks after {self._tpu} already: {who}',
        f'launch/tpu_pod.sh status --tpu {self._tpu} tells how it is',
      ) from None
    self._file.truncate(0)
    since = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())
    self._file.write(
      f'{stage}: process {os.getpid()} on {socket.gethostname()} since {since}'
    )
    self._file.flush()

  def settle(self) -> None:
    """Notes that nothing runs any more that somebody should look after."""
    if self._file:
      self._file.truncate(0)


class _Detached(Exception):
  """A signal ends this process, and nothing else."""


def _detach(signum, frame):
  for each in _SIGNALS:  # Once: what follows is the way out.
    signal.signal(each, signal.SIG_IGN)
  raise _Detached(signum)


def run_stage(cloud: Cloud, name: str, command: list[str]) -> int:
  """Runs a stage on the TPU until it is done or a limit is used up.

  Returns:
    The exit status.
  """
  s = cloud.settings
  s.need_zone()
  cloud.check()
  command += [*([] if name in ONE_HOST else ['--distributed']), *s.extra]
  lock = Lock(cloud)
  if not cloud.dry:
    lock.take(name)
    for signum in _SIGNALS:
      signal.signal(signum, _detach)
  budget = Budget(cloud, name)
  if name not in ONE_HOST and '://' not in s.workdir:
    say(
      f'note: --workdir {s.workdir} is not in a bucket: all workers must see '
      'the same folder there, and it must outlive the TPU (NFS does)'
    )
  say(f'{name} on every worker: {shlex.join(command)}')
  try:
    status = _supervise(cloud, name, command, budget)
  except _Detached as signalled:
    say(
      f'detached: {name} goes on if it is running, but nobody makes the TPU '
      'anew if it is preempted, or ends it at its budget',
      'the same command attaches again; stop ends the stage, '
      f'down --tpu {s.tpu} the TPU and what it costs',
    )
    return 128 + signalled.args[0]
  except BaseException:
    # Whatever this process dies of, also a mistake in it.
    say(
      f'nobody looks after TPU {s.tpu} now. If it is there, it runs on, and '
      f'is paid for, until: launch/tpu_pod.sh down --tpu {s.tpu}'
    )
    raise
  lock.settle()
  return status


def _supervise(cloud: Cloud, name: str, command, budget: Budget) -> int:
  s = cloud.settings
  no_budget = f'the budget of {s.budget} TPU hours is used up'
  if budget.used_up():
    return _give_up(cloud, name, no_budget)
  restarts = streak = 0
  while True:
    try:
      outcome = _attempt(cloud, name, command, budget)
      break
    except RetryLater as retry:
      outcome = retry.outcome
      if retry.ran >= 3600:
        streak = 0
    restarts += 1
    if restarts > s.max_restarts:
      why = f'{outcome} again, after {s.max_restarts} restarts'
      return _give_up(cloud, name, why)
    if budget.used_up():
      return _give_up(cloud, name, no_budget)
    delay = min(1800, s.backoff << min(streak, 12))
    streak += 1
    say(
      f'{outcome}; trying again in {duration(delay)} (restart {restarts} of at '
      f'most {s.max_restarts}; {budget} used)'
    )
    # What is over takes up quota until it is deleted.
    if outcome == 'preempted' and cloud.queue_state()[0] != 'ABSENT':
      remove_request(cloud)
    pause(delay)
  if outcome == 'stopped':
    again = (
      'starts it again' if name in ONE_HOST else 'goes on from its checkpoint'
    )
    say(f'{name} was stopped; the same command {again}')
    return _STOPPED
  if outcome == 'failed':
    raise PodError(
      f'{name} failed on its own account: starting it again would not help',
      'see the log above; mend the cause, then the same command goes on',
    )
  if outcome == 'budget':
    say('the budget is used up: stopping (which saves)')
    stop = worker('stop', s.grace)
    relay(cloud.on_workers('all', stop, s.grace + 300).out, '')
    return _give_up(cloud, name, no_budget)
  if not cloud.dry:
    say(f'{name} is finished ({budget}): {s.workdir or ""}')
    os.unlink(budget.path)
  _leave(cloud)
  return 0


def _attempt(cloud: Cloud, name: str, command, budget: Budget) -> str:
  """One TPU, until the stage is no longer running there."""
  bring_up(cloud)
  budget.start()
  try:
    install_everywhere(cloud, name)
    if name == 'serve':
      bring_key(cloud)
    start_everywhere(cloud, name, command)
    if name == 'serve':
      tell_way(cloud)
    return watch_stage(cloud, name, budget)
  finally:
    budget.charge()


def _give_up(cloud: Cloud, name: str, why: str) -> int:
  say(f'error: {why}; {name} goes on from its checkpoint when started again')
  _leave(cloud)
  return _LIMIT


def _leave(cloud: Cloud) -> None:
  """What happens to a TPU that is no longer used."""
  if cloud.settings.delete_after:
    take_down(cloud, ask=False)
  else:
    tpu = cloud.settings.tpu
    say(
      f'TPU {tpu} is kept, and paid for, until: '
      f'launch/tpu_pod.sh down --tpu {tpu}'
    )
