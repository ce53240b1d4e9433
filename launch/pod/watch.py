"""A stage that runs on the workers, seen from here."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from pod.cloud import Cloud, is_lost, worker
from pod.create import RetryLater
from pod.install import not_reached
from pod.log import PodError, now, pause, relay, say
from pod.stage import ONE_HOST

# Workers may end one after the other, and a preempted TPU says so only some
# time after its processes died: until then, a failure is not taken for one.
_SETTLE_SECONDS = 90

# How long nobody may answer, here or there, before the stage is given up for
# interrupted.
_BLIND_SECONDS = 1800

# Told to end, or (75) lost another worker: not the cause of anything.
_SIGNALLED = ('130', '143', '75')


class Report(NamedTuple):
  """The job on a worker, as worker.py's `report` prints it."""

  number: str
  state: str
  began: str
  exit: str
  name: str
  last: str

  @property
  def failed(self) -> bool:
    if self.state == 'exited':
      return self.exit not in ('0', *_SIGNALLED)
    return self.state == 'killed'


def start_everywhere(cloud: Cloud, name: str, command: list[str]) -> None:
  if name in ONE_HOST and len(reports(cloud) or ()) > 1:
    raise PodError(
      f'{name} runs on one machine; TPU {cloud.settings.tpu} has several'
    )
  say(f'starting {name} on all workers')
  answer = cloud.on_workers('all', worker('start', name, *command))
  if answer.status:
    relay(answer.out)
    not_reached(cloud, answer, f'{name} could not be started on all workers')
  for line in answer.out.splitlines():
    if line.startswith('worker 0: '):
      say(line)


def reports(cloud: Cloud) -> list[Report] | None:
  """The job on every worker; None if not all of them answer."""
  answer = cloud.on_workers('all', worker('report'))
  if cloud.dry:
    return [Report('0', 'exited', 'BEGAN', '0', '-', '-')]
  lines = [line.split('\t') for line in answer.out.splitlines()]
  found = [
    Report(*fields[1:])
    for fields in lines
    if fields[0] == 'report' and len(fields) == 7
  ]
  if answer.status:
    cloud.refusal = answer.err
    return None
  return sorted(found, key=lambda r: (len(r.number), r.number)) or None


def _verdict(cloud: Cloud) -> tuple[str, list[Report]]:
  """How the stage is, and what each worker says.

  lost (the TPU), blind (no worker answers), running, finished, stopped,
  rebooted, signalled or failed.
  """
  if is_lost(cloud.tpu_state()):
    return 'lost', []
  found = reports(cloud)
  if found is None:
    return 'blind', []
  states = {report.state for report in found}
  if 'stopped' in states and 'running' not in states:
    return 'stopped', found
  if any(report.failed for report in found):
    return 'failed', found
  if states & {'rebooted', 'absent'}:
    return 'rebooted', found
  if any(r.state == 'exited' and r.exit in _SIGNALLED for r in found):
    return 'signalled', found
  return ('running' if 'running' in states else 'finished'), found


def _settle(cloud: Cloud) -> tuple[str, list[Report]]:
  """Asks until the answer is one to act on."""
  since = now()
  while True:
    answer, found = _verdict(cloud)
    patience = _BLIND_SECONDS if answer == 'blind' else _SETTLE_SECONDS
    settled = answer in ('lost', 'running', 'finished', 'stopped')
    if settled or now() - since >= patience:
      return answer, found
    pause(10)


def watch_stage(cloud: Cloud, name: str, budget) -> str:
  """Prints worker 0's log until the stage is no longer running.

  Args:
    cloud: of the TPU.
    name: of the stage.
    budget: `supervise.Budget`, which is charged.

  Returns:
    finished, stopped, failed or budget.

  Raises:
    RetryLater: preempted or interrupted.
  """
  answer, found = 'running', reports(cloud)
  # A preemption may come at any moment, this one too.
  if found is None:
    answer, found = _settle(cloud)
  began = next((r.began for r in found if r.number == '0'), '')
  if not re.fullmatch(r'\d{8}T\d{6}|BEGAN', began):
    began = 'unknown'
  copy = os.path.join(cloud.settings.folder, f'{name}-{began}.log')

  def stream():
    have = os.path.getsize(copy) if os.path.exists(copy) else 0
    command = worker('follow', began, have)
    return cloud.stream(0, command, None if cloud.dry else copy)

  streaming, complete = None, False
  start = checked = now()
  looks = 0
  try:
    while answer == 'running':
      if streaming is None:
        streaming = stream()
        continue
      if not streaming.running():
        complete = streaming.finish() == 0
        streaming = None
        answer, found = _settle(cloud)
        if answer == 'running':
          say('the log ended but the stage is running: connecting again')
          pause(5)
        continue
      pause(1)
      if now() - checked >= 60:
        checked = now()
        looks += 1
        budget.charge()
        if budget.used_up():
          answer = 'budget'
        elif is_lost(cloud.tpu_state()):
          answer = 'lost'
        elif looks % 5 == 0:
          answer, found = _settle(cloud)
  finally:
    if streaming is not None:
      streaming.finish(0)
  if answer == 'failed':
    _show_failures(cloud, found)
  # What came after the connection broke; by now nothing runs.
  if answer in ('finished', 'failed', 'stopped') and not complete:
    stream().finish(300)
  if not cloud.dry:
    say(f"worker 0's log: {copy}")
  if answer == 'lost':
    raise RetryLater('preempted', now() - start)
  if answer in ('rebooted', 'signalled', 'blind'):
    say(f'the workers say: {answer}')
    raise RetryLater('interrupted', now() - start)
  return answer


def _show_failures(cloud: Cloud, found: list[Report]) -> None:
  """Names the workers that failed, with the end of the log of some of them.

  The others are stopped: they would wait for them.
  """
  failed = [report for report in found if report.failed]
  for count, report in enumerate(failed):
    how = f'ended with exit status {report.exit}'
    if report.state == 'killed':
      how = 'was killed without a word (out of memory?)'
    elif report.exit == '137':
      how = 'was killed (exit 137; out of memory?)'
    say(f'worker {report.number} {how}')
    if count < 3:
      answer = cloud.on_workers(report.number, worker('tail', 40))
      relay(answer.out, f'worker {report.number}: ')
  cloud.on_workers('all', worker('stop', 30))
