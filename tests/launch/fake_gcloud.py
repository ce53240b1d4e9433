"""Stands in for gcloud: records its calls and plays a small Cloud TPU.

Workers are folders, and what is sent to them by ssh runs there for real, so
that a mistake in quoting shows. All is in the folder $FAKE:

  calls.jsonl    the arguments of every call, a line each
  script.json    what to play, see below
  cloud.json     the state of the cloud
  tpu K/worker N   the home of worker N of the K-th TPU created
  preempt, drop  made by the program on a worker: the connection that streams
                 its log breaks, with `preempt` because the TPU is taken away

script.json:

  workers        of a TPU
  existing       a TPU is there from the start, requested without a queue
  attempts       what each request comes to, the last one for all later ones:
                   error    create fails and says this
                   states   what describe tells, one after the other
                   failed   the reason told with a state FAILED
  tpu            the state that describe tells of the TPU, once it is there
  blind          so many descriptions fail at first, and
  says           what then
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(os.environ['FAKE'])
FAILED_SSH = 255

# Seconds that a connection lives at least.
LIFE = 0.5


def main(arguments):
  with (HERE / 'calls.jsonl').open('a') as calls:
    calls.write(json.dumps(arguments) + '\n')
  words = [word for word in arguments if not word.startswith('--')]
  flags = dict(
    word.removeprefix('--').partition('=')[::2]
    for word in arguments
    if word.startswith('--')
  )
  if words[0] == 'alpha':
    words = words[1:]
  _, _, kind, verb, *rest = words
  if verb == 'ssh':
    return ssh(flags['worker'], flags['command'])
  if verb == 'scp':
    return copy(pathlib.Path(rest[0]), rest[1].split(':')[1])
  with Cloud() as cloud:
    return {
      ('queued-resources', 'create'): cloud.create,
      ('queued-resources', 'describe'): cloud.describe_queue,
      ('queued-resources', 'delete'): cloud.delete_queue,
      ('tpu-vm', 'describe'): cloud.describe_tpu,
      ('tpu-vm', 'delete'): cloud.delete_tpu,
    }[kind, verb]()


def fail(message, status=1):
  print(f'ERROR: (gcloud.compute.tpus) {message}', file=sys.stderr)
  return status


class Cloud:
  """What there is, kept between calls."""

  def __enter__(self):
    self._lock = (HERE / 'lock').open('w')
    fcntl.flock(self._lock, fcntl.LOCK_EX)
    self.script = json.loads((HERE / 'script.json').read_text())
    path = HERE / 'cloud.json'
    if path.exists():
      self.state = json.loads(path.read_text())
    else:
      self.state = {
        'requests': 0,
        'queue': None,
        'tpu': None,
        'told': 0,
        'blind': self.script.get('blind', 0),
      }
      if self.script.get('existing'):
        self._make_workers()
    return self

  def __exit__(self, *error):
    (HERE / 'cloud.json').write_text(json.dumps(self.state))
    self._lock.close()

  def attempt(self):
    attempts = self.script['attempts']
    return attempts[min(self.state['requests'], len(attempts)) - 1]

  def homes(self):
    if self.state['tpu'] != 'READY':
      return None
    folder = HERE / f'tpu {self.state["requests"]}'
    return [folder / f'worker {n}' for n in range(self.script['workers'])]

  def create(self):
    if self.state['queue']:
      return fail('ALREADY_EXISTS: Resource already exists')
    self.state['requests'] += 1
    attempt = self.attempt()
    if 'error' in attempt:
      return fail(attempt['error'])
    self.state.update(queue='CREATING', told=0)
    return 0

  def describe_queue(self):
    if self.state['blind']:
      self.state['blind'] -= 1
      return fail(self.script.get('says', 'Unable to connect to the server'))
    if not self.state['queue']:
      return fail('NOT_FOUND: Resource was not found')
    reason = ''
    if self.state['queue'] not in ('ACTIVE', 'SUSPENDED'):
      attempt = self.attempt()
      states = attempt['states']
      self.state['queue'] = states[min(self.state['told'], len(states) - 1)]
      self.state['told'] += 1
      if self.state['queue'] == 'ACTIVE':
        self._make_workers()
      elif self.state['queue'] == 'FAILED':
        reason = attempt['failed']
    print(f'{self.state["queue"]}\t{reason}')
    return 0

  def delete_queue(self):
    if not self.state['queue']:
      return fail('NOT_FOUND: Resource was not found')
    self.state.update(queue=None)
    return self.delete_tpu()

  def describe_tpu(self):
    if not self.state['tpu']:
      return fail('NOT_FOUND: Resource was not found')
    print(self.script.get('tpu', self.state['tpu']))
    return 0

  def delete_tpu(self):
    self._kill()
    self.state.update(tpu=None)
    return 0

  def _make_workers(self):
    self.state['tpu'] = 'READY'
    for home in self.homes():
      home.mkdir(parents=True)

  def preempt(self):
    self._kill()
    self.state['tpu'] = 'PREEMPTED'
    if self.state['queue']:
      self.state['queue'] = 'SUSPENDED'

  def _kill(self):
    for home in self.homes() or ():
      pid = home / 'qwenvl_jax/job/pid'
      if pid.exists():
        kill_group(int(pid.read_text()))
      shutil.rmtree(home / 'qwenvl_jax', ignore_errors=True)


def kill_group(pid):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(pid, signal.SIGKILL)


def chosen(workers):
  """(number, home) of the workers that --worker names; none without a TPU."""
  with Cloud() as cloud:
    homes = cloud.homes() or []
  numbered = list(enumerate(homes))
  return numbered if workers == 'all' else numbered[int(workers) :][:1]


def ssh(workers, command):
  running = {}
  for number, home in chosen(workers):
    environment = {
      'HOME': str(home),
      'PATH': f'{HERE / "remote bin"}:/usr/bin:/bin',
      'FAKE': str(HERE),
      'REAL_PYTHON': sys.executable,
      'WORKER': str(number),
    }
    running[number] = subprocess.Popen(
      ['bash', '-c', command],
      cwd=home,
      env=environment,
      stdin=subprocess.DEVNULL,
      start_new_session=True,
    )
  if not running:
    return fail('This TPU has terminal state "PREEMPTED"')
  statuses = {}
  began = time.monotonic()
  while len(statuses) < len(running):
    for number, process in running.items():
      if number not in statuses and process.poll() is not None:
        statuses[number] = process.returncode
        if process.returncode:
          print(
            f'##### Command execution on worker {number} failed '
            f'with exit status {process.returncode}. Continuing.',
            file=sys.stderr,
          )
    if time.monotonic() - began > LIFE and broken(command):
      for process in running.values():
        kill_group(process.pid)
      return fail('[/usr/bin/ssh] exited with return code [255].', FAILED_SSH)
    time.sleep(0.01)
  return next((status for status in statuses.values() if status), 0)


def broken(command):
  """Whether the connection breaks now, perhaps since the TPU is gone."""
  if ' follow ' not in command:
    return False
  if (HERE / 'preempt').exists():
    (HERE / 'preempt').unlink()
    with Cloud() as cloud:
      cloud.preempt()
    return True
  if (HERE / 'drop').exists():
    (HERE / 'drop').unlink()
    return True
  return False


def copy(source, target):
  for _, home in chosen('all'):
    shutil.copy(source, home / target)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
