#!/usr/bin/env python3
"""What one worker of a pod does.

tpu_pod.sh calls this over ssh on each worker, and for each process of --local,
on the Python that the machine comes with. One job at a time; `job/` tells of
the last, a file for each of name, began, boot, command, pid, log, exit (how it
ended) and stopped (it was asked to).

Usage: worker.py VERB

  install TREE EXTRAS         make this code the checkout, and its environment
  start NAME COMMAND...       run a command that outlives the connection, on
                              folders where it says mount://BUCKET
  run NAME COMMAND...         run it here: log, pid and exit status in job/
  report                      a line of tab-separated fields about the job
  follow BEGAN OFFSET         its log from a byte on until it ends
  tail LINES                  the end of its log
  stop SECONDS                SIGTERM, which saves; after so long SIGKILL
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

_CHECKOUT = os.path.abspath(os.path.join(os.path.dirname(__file__), '../..'))
# Holds the checkout, its `installed` mark, `job/`, and buckets as folders.
_HOME = os.environ.get('QWENVL_POD_HOME') or os.path.dirname(_CHECKOUT)
_JOB = os.path.join(_HOME, 'job')

_NUMBER = (
  'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
  'agent-worker-number'
)
# Whether an interpreter can make the environment.
_USABLE = 'import ensurepip, sys, venv\nsys.exit(sys.version_info < (3, 11))'

# As https://cloud.google.com/storage/docs/cloud-storage-fuse/install has it. A
# fresh machine updates itself, and holds the lock for some minutes.
_INSTALL_GCSFUSE = """
set -e
packages=https://packages.cloud.google.com/apt
key=/usr/share/keyrings/cloud.google.asc
curl -fsS --max-time 60 "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
  sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install gcsfuse
"""


def main(verb='--help', *words):
  verbs = (install, start, run, supervise, report, follow, tail, stop)
  known = {function.__name__: function for function in verbs}
  if verb not in known:
    print(__doc__, file=sys.stderr)
    return 0 if verb in ('-h', '--help') else 2
  return known[verb](*words) or 0


def tell(text):
  print(f'worker {number()}: {text}', flush=True)


def number():
  """This worker's number in the pod, or a question mark."""
  found = os.environ.get('QWENVL_PROCESS_ID')
  header = 'Metadata-Flavor: Google'
  command = ['curl', '-fsS', '--max-time', '5', '-H', header, _NUMBER]
  if not found:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
      quiet = subprocess.DEVNULL
      found = subprocess.check_output(command, stderr=quiet).decode().strip()
  match = re.search(r'-w-(\d+)$', socket.gethostname())
  return found or (match[1] if match else '?')


def read(path):
  with contextlib.suppress(OSError), open(path, errors='replace') as file:
    return file.read().strip()
  return ''


def field(name):
  return read(os.path.join(_JOB, name))


def note(name, text=''):
  """Writes a field so that it is there whole or not at all."""
  path = os.path.join(_JOB, name)
  with open(path + '.new', 'w') as file:
    file.write(f'{text}\n')
  os.replace(path + '.new', path)


def boot():
  return read('/proc/sys/kernel/random/boot_id')


def alive():
  """Whether the job's process is there: its number may be another's by now."""
  pid = field('pid')
  return (
    bool(pid)
    and boot() == field('boot')
    and 'worker.' in read(f'/proc/{pid}/cmdline')
  )


def call(log, *command, **environment):
  """Runs a command; what it says goes to an open log.

  Raises:
    OSError: there is no such command.
    CalledProcessError: it failed.
  """
  environment = {**os.environ, **environment}
  subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)


def interpreter(log):
  """An interpreter for the environment.

  TPU VMs come with Python 3.10, and their package manager is often locked in
  the first minutes.
  """
  for name in ('python3.11', 'python3.12', 'python3.13', 'python3'):
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
      call(subprocess.DEVNULL, name, '-c', _USABLE)
      return name
  pip = 'python3', '-m', 'pip', 'install', '--user', '--quiet', 'uv'
  uv = 'python3', '-m', 'uv', 'python'
  call(log, *pip, PIP_BREAK_SYSTEM_PACKAGES='1')
  call(log, *uv, 'install', '--quiet', '3.11')
  return subprocess.check_output([*uv, 'find', '3.11']).decode().strip()


def install(tree, extras):
  if alive():
    tell(f'FAILED: {field("name")} is running; stop it first')
    return 1
  new, checkout = os.path.join(_HOME, 'new'), os.path.join(_HOME, 'checkout')
  # The environment stays, if it is still the right one: env.sh looks.
  if new == _CHECKOUT:
    if os.path.isdir(f'{checkout}/.venv'):
      os.rename(f'{checkout}/.venv', f'{new}/.venv')
    shutil.rmtree(checkout, ignore_errors=True)
    os.rename(new, checkout)
  tell('installing')

  def make(log):
    make = f'{checkout}/launch/env.sh'
    call(log, make, PYTHON=interpreter(log), EXTRAS=extras)

  log = os.path.join(_HOME, 'install.log')
  if not succeeds(make, log):
    tell(f'FAILED: the above is the end of {log}')
    return 1
  with open(os.path.join(_HOME, 'installed'), 'w') as file:
    file.write(f'{tree} {extras}\n')
  tell('ready')
  return 0


def mount(bucket):
  """Makes a bucket a folder; returns whether it is one."""
  folder = os.path.join(_HOME, 'buckets', bucket)
  # Prepared data does not change: what is known of a file stays so.
  options = '-o', 'ro', '--implicit-dirs', '--metadata-cache-ttl-secs=-1'

  def make(log):
    if not shutil.which('gcsfuse'):
      call(log, 'bash', '-c', _INSTALL_GCSFUSE)
    os.makedirs(folder, exist_ok=True)
    call(log, 'gcsfuse', *options, bucket, folder)

  log = os.path.join(_HOME, 'mount.log')
  if os.path.ismount(folder) or succeeds(make, log):
    return True
  tell(
    f'FAILED: bucket {bucket} cannot be mounted: does it exist, and may the '
    'service account use it?'
  )
  return False


def succeeds(make, path):
  """Whether a function ends well; else tells the end of its log."""
  with open(path, 'wb') as log:
    try:
      make(log)
      return True
    except (OSError, subprocess.CalledProcessError) as error:
      log.write(f'{error}\n'.encode())
  for line in read(path).splitlines()[-20:]:
    tell(line)
  return False


def prepare(name, command):
  """Makes job/ anew, keeping the log of what ran before."""
  if os.path.isdir(_JOB):
    earlier = os.path.join(_HOME, 'earlier')
    os.makedirs(earlier, exist_ok=True)
    old = f'{field("name")}-{field("began")}-{os.getpid()}'
    os.rename(_JOB, os.path.join(earlier, old))
  os.makedirs(_JOB)
  note('name', name)
  note('began', time.strftime('%Y%m%dT%H%M%S', time.gmtime()))
  note('boot', boot())
  note('command', json.dumps(command))
  open(os.path.join(_JOB, 'log'), 'w').close()


def start(name, *words):
  buckets = {
    x for word in words for x in re.findall(r'mount://([-\w.]*)', word)
  }
  if not all(map(mount, sorted(buckets))):
    return 1
  command = [word.replace('mount://', f'{_HOME}/buckets/') for word in words]
  if alive():
    if [field('name'), field('command')] == [name, json.dumps(command)]:
      tell(f'{name} is running since {field("began")}')
      return 0
    tell(f'FAILED: {field("name")} is running, started otherwise')
    return 1
  prepare(name, command)
  path = f'{_CHECKOUT}/.venv/bin:{os.environ.get("PATH", os.defpath)}'
  process = subprocess.Popen(
    [sys.executable, os.path.abspath(__file__), 'supervise', *command],
    cwd=_CHECKOUT,
    env={**os.environ, 'PATH': path},
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  note('pid', process.pid)
  tell(f'started {name}')
  return 0


def run(name, *command):
  prepare(name, command)
  note('pid', os.getpid())
  return supervise(*command)


def supervise(*command):
  """Runs the command, passes SIGTERM on, and writes how it ended.

  Without that, a finished job and a killed one would look alike.
  """
  told, child = [], None

  def pass_on(signum, frame):
    told.append(signum)
    if child is not None:
      child.terminate()

  signal.signal(signal.SIGTERM, pass_on)
  with open(os.path.join(_JOB, 'log'), 'ab') as log:
    try:
      child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
      )
    except OSError as error:
      log.write(f'{command[0]}: {error.strerror}\n'.encode())
      note('exit', 127)
      return 127
    if told:
      child.terminate()
    code = child.wait()
  note('exit', code if code >= 0 else 128 - code)
  return code if code >= 0 else 128 - code


def report():
  """Prints `report NUMBER STATE BEGAN EXIT NAME LAST`.

  The state is absent, running, exited, stopped (because asked to), killed (gone
  without a word) or rebooted.
  """
  state, last = 'exited', ''
  if not field('pid'):
    state = 'absent'
  elif alive():
    state = 'running'
  elif os.path.exists(f'{_JOB}/stopped') and field('exit') != '0':
    state = 'stopped'
  elif not field('exit'):
    state = 'killed' if boot() == field('boot') else 'rebooted'
  with contextlib.suppress(OSError), open(f'{_JOB}/log', 'rb') as log:
    log.seek(max(0, os.path.getsize(f'{_JOB}/log') - 2**16))
    for line in log.read().decode(errors='replace').splitlines():
      if re.search('step [0-9]', line):
        last = line.replace('\t', ' ')[:200]
  fields = number(), state, field('began'), field('exit'), field('name'), last
  print('report', *(x or '-' for x in fields), sep='\t')


def follow(began, offset):
  if field('began') != began:
    print(f'the log of {began} is no longer here', file=sys.stderr)
    return 1
  until = ['-F', '-s', '0.5', f'--pid={field("pid")}'] if alive() else []
  return tail(f'+{int(offset) + 1}', '-c', *until)


def tail(count, unit='-n', *more):
  return subprocess.run(['tail', unit, count, *more, f'{_JOB}/log']).returncode


def stop(seconds):
  if not alive():
    tell('nothing is running')
    return
  pid, name = int(field('pid')), field('name')
  note('stopped')
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, signal.SIGTERM)
  deadline = time.monotonic() + float(seconds)
  while alive():
    if time.monotonic() >= deadline:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
      tell(f'{name} did not end within {seconds} s: killed')
      return
    time.sleep(0.2)
  tell(f'{name} stopped (exit {field("exit")})')


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
