"""A cloud for launch/tpu_pod.sh: stand-ins for gcloud and for workers."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
HERE = ROOT / 'tests/launch'

# Its clock runs so many times faster.
SPEEDUP = 100
TYPE = '--type=v5litepod-16'
ONE_HOST = '--type=v5litepod-8'
# Values that a missing quote anywhere between here and a worker would break.
AWKWARD = [
  """--gin.Optimizer.trainable=('a b/.*', "it's (c)|d", '$HOME \\\\ *')""",
  "--gin.NOTE='two  spaces; and & more'",
]


def git(root, *arguments):
  identity = ('-c', 'user.name=t', '-c', 'user.email=t@example.org')
  subprocess.run(['git', *identity, *arguments], cwd=root, check=True)


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


class Pod:
  """A cloud that plays a script, and tpu_pod.sh against it."""

  def __init__(self, folder, checkout):
    self.folder = folder / 'the cloud'
    self.checkout = checkout
    python = shlex.quote(sys.executable)
    executable(
      folder / 'bin/gcloud',
      f'#!/bin/sh\nexec {python} {shlex.quote(str(HERE))}/fake_gcloud.py '
      '"$@"\n',
    )
    remote = self.folder / 'remote bin'
    trainer = shlex.quote(str(HERE / 'fake_trainer.py'))
    executable(
      remote / 'qwenvl-train', f'#!/bin/sh\nexec {python} {trainer} "$@"\n'
    )
    executable(remote / 'gcsfuse', (HERE / 'fake_gcsfuse.sh').read_text())
    executable(remote / 'curl', '#!/bin/sh\necho "$WORKER"\n')
    executable(remote / 'python3.11', (HERE / 'fake_python.sh').read_text())
    self._environment = {
      **{k: v for k, v in os.environ.items() if not k.startswith('QWENVL_')},
      'PATH': f'{folder / "bin"}:{os.environ["PATH"]}',
      'FAKE': str(self.folder),
      'QWENVL_POD_SPEEDUP': str(SPEEDUP),
      'QWENVL_POD_STATE': str(folder / 'state'),
      'QWENVL_POD_TPU': 'pod1',
      'QWENVL_POD_ZONE': 'us-west4-a',
    }
    self.state = folder / 'state'
    self.play()
    self.train(steps=4)

  def play(self, *attempts, workers=2, **more):
    """Says what requests for a TPU come to."""
    attempts = attempts or [{'states': ['ACTIVE']}]
    script = {'workers': workers, 'attempts': attempts, **more}
    (self.folder / 'script.json').write_text(json.dumps(script))

  def train(self, **script):
    """Says what the program on the workers does."""
    (self.folder / 'trainer.json').write_text(json.dumps(script))

  def popen(self, *arguments, **environment):
    return subprocess.Popen(
      [str(self.checkout / 'launch/tpu_pod.sh'), *arguments],
      env=self._environment | environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, *arguments, status=0, **environment):
    process = self.popen(*arguments, **environment)
    process.out, process.err = process.communicate(timeout=120)
    said = f'{process.out}\n-- and --\n{process.err}'
    assert process.returncode == status, said
    return process

  def stage(self, *arguments, status=0, **environment):
    return self.run(
      'stage2',
      TYPE,
      '--workdir=gs://b/runs',
      *arguments,
      status=status,
      **environment,
    )

  def calls(self, *words):
    """What gcloud was asked, of what contains these words."""
    path = self.folder / 'calls.jsonl'
    lines = path.read_text().splitlines() if path.exists() else ()
    calls = map(json.loads, lines)
    return [call for call in calls if set(words) <= set(call)]

  def starts(self, worker):
    """How the program was started on a worker, each time."""
    path = self.folder / f'starts {worker}'
    return [json.loads(line) for line in path.read_text().splitlines()]

  def log(self, worker):
    """The log of a process of the newest run with --local."""
    runs = (self.state / 'local').glob(f'*/worker{worker}/job/log')
    return max(runs, key=lambda path: path.stat().st_ctime_ns, default=None)

  def wait_for(self, condition):
    deadline = time.monotonic() + 60
    while not condition():
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def end(self):
    for pid in [
      *self.folder.glob('tpu */worker */qwenvl_jax/job/pid'),
      *self.state.glob('local/*/*/job/pid'),
    ]:
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except (ProcessLookupError, ValueError):
        continue


def steps(text):
  return [int(step) for step in re.findall(r'^step (\d+)/', text, re.M)]
