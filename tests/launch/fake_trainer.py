"""Stands in for qwenvl-train on a worker or in a process of --local.

Counts steps, and goes on from where an earlier run of it was. What happens is
in $FAKE/trainer.json:

  steps      to take, in all
  preempt    at these steps the TPU is taken away
  drop       at these steps the streaming connection breaks
  exit       {worker: [step, status]}: that worker ends then; a negative status
             is a signal that kills it
  deaf       it does not end when told to
  wait       at this step it waits until it is told to end
  says       a line that it prints first
"""

import json
import os
import pathlib
import signal
import sys
import time

here = pathlib.Path(os.environ['FAKE'])
script = json.loads((here / 'trainer.json').read_text())
worker = os.environ.get('WORKER') or os.environ['QWENVL_PROCESS_ID']
checkpoint = here / f'checkpoint {worker}'


def say(text):
  print(text, file=sys.stderr, flush=True)


def save_and_end(signum, frame):
  if script.get('deaf'):
    return
  say(f'saved by {signal.Signals(signum).name}')
  sys.exit(128 + signum)


def main():
  signal.signal(signal.SIGTERM, save_and_end)
  with (here / f'starts {worker}').open('a') as starts:
    record = {'argv': sys.argv[1:], 'cwd': os.getcwd()}
    record |= {k: v for k, v in os.environ.items() if k.startswith('QWENVL_')}
    starts.write(json.dumps(record) + '\n')
  if 'says' in script:
    say(script['says'])
  start = int(checkpoint.read_text()) if checkpoint.exists() else 0
  if start:
    say(f'resumed from step {start}')
  for step in range(start + 1, script['steps'] + 1):
    say(f'step {step}/{script["steps"]}  loss {1 / step:.3f}')
    checkpoint.write_text(str(step))
    last, status = script.get('exit', {}).get(worker, (None, 0))
    if step == last:
      # Not before the others are there.
      for other in range(int(os.environ.get('QWENVL_NUM_PROCESSES', 2))):
        while not (here / f'checkpoint {other}').exists():
          time.sleep(0.01)
      say('Traceback: the cause stands here')
      if status < 0:
        os.kill(os.getpid(), -status)
      sys.exit(status)
    for event in ('preempt', 'drop'):
      if worker == '0' and step in script.get(event, ()):
        (here / event).touch()
        while event == 'preempt' or (here / event).exists():
          time.sleep(0.01)
    while step == script.get('wait'):
      time.sleep(0.01)
    time.sleep(0.01)


main()
