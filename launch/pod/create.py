"""From nothing to a TPU that is ready, and back."""

from __future__ import annotations

import sys

from pod.cloud import CHANGING, Cloud, is_lost
from pod.log import PodError, UsageError, duration, now, pause, say

# Seconds until a TPU is ready once it is not in the queue (--queue-hours).
_CHANGING_SECONDS = 7200

# States of a request that wait for chips, and those that are over.
_QUEUED = ('WAITING_FOR_RESOURCES', 'CREATING', 'ACCEPTED')
_OVER = ('SUSPENDED', 'SUSPENDING', 'FAILED', 'DELETING')


class RetryLater(Exception):
  """Trying again later may help.

  Attributes:
    outcome: capacity, preempted, or what else came in between.
    ran: seconds that the stage was watched.
  """

  def __init__(self, outcome: str, ran: float = 0):
    super().__init__(outcome)
    self.outcome, self.ran = outcome, ran


def bring_up(cloud: Cloud) -> None:
  """Returns when the TPU is ready.

  Raises:
    RetryLater: there is no capacity, or it was preempted.
    PodError: where trying again would not help.
  """
  s = cloud.settings
  state, _ = cloud.certain(cloud.queue_state, 'ABSENT')
  say(f'TPU {s.tpu} in {s.zone}: its queued resource is {state}')
  if state == 'ABSENT' and not _exists(cloud):
    _request(cloud)
  elif state in _OVER:
    say('that request is over: it is removed and made anew')
    remove_request(cloud)
    _request(cloud)
  if not cloud.dry:
    s.remember()
  _wait_until_ready(cloud)


def _exists(cloud: Cloud) -> bool:
  """Whether there is a TPU that was not requested through a queue."""
  state = cloud.certain(cloud.tpu_state, 'ABSENT')
  if state == 'ABSENT':
    return False
  if is_lost(state):
    raise PodError(
      f'TPU {cloud.settings.tpu} is {state}, and was not requested through a '
      'queue: it is not made anew by itself',
      'launch/tpu_pod.sh down deletes it; then up requests a new one',
    )
  say(f'it was not requested through a queue; its state: {state}')
  return True


def _request(cloud: Cloud) -> None:
  s = cloud.settings
  if not s.type:
    raise UsageError(
      '--type is missing: v5litepod-256, v5p-128, v6e-256, v4-512, ...'
    )
  say(f'requesting {s.type} ({s.capacity}), software {s.runtime_version}')
  answer = cloud.call(
    *('compute', 'tpus', 'queued-resources', 'create', s.tpu),
    f'--node-id={s.tpu}',
    f'--accelerator-type={s.type}',
    f'--runtime-version={s.runtime_version}',
    *([] if s.capacity == 'on-demand' else [f'--{s.capacity}']),
    *s.create_flags,
    limit=CHANGING,
  )
  if answer.status:
    _refused(cloud, answer.err, f'the request for TPU {s.tpu} was refused')


def _refused(cloud: Cloud, reason: str, message: str) -> None:
  kind = cloud.explain(reason)
  if kind == 'capacity':
    raise RetryLater('capacity')
  raise PodError(f'{message} ({kind})')


def _wait_until_ready(cloud: Cloud) -> None:
  s = cloud.settings
  began = told = since = now()
  before, queued = '', None
  while True:
    state, reason = cloud.certain(cloud.queue_state)
    shown = state
    # ABSENT: a TPU that was not requested through a queue.
    if state in ('ACTIVE', 'ABSENT'):
      tpu = cloud.certain(cloud.tpu_state)
      if tpu == 'READY':
        say(f'TPU {s.tpu} is ready')
        return
      if is_lost(tpu):
        say(f'TPU {s.tpu} is {tpu}')
        raise RetryLater('preempted')
      shown = f'{state}, TPU {tpu}'
    elif state == 'FAILED':
      say('the request failed:')
      _refused(cloud, reason, f'TPU {s.tpu} was not granted')
    elif state in _OVER:
      say('it was preempted before it was ready')
      raise RetryLater('preempted')
    time = now()
    if queued != (state in _QUEUED):
      queued, since = state in _QUEUED, time
    if shown != before or time - told >= 300:
      before, told = shown, time
      meaning = {
        'WAITING_FOR_RESOURCES': ': in the queue until chips are free',
        'PROVISIONING': ': the chips are there, machines are started',
      }.get(state, '')
      say(f'{shown} after {duration(time - began)}{meaning}')
    limit = s.queue_hours * 3600 if queued else _CHANGING_SECONDS
    if time - since >= limit:
      message = f'TPU {s.tpu} is {shown} after {duration(time - since)}'
      if queued:
        raise PodError(
          f'{message}: --queue-hours is used up; the request stays',
          'the same command waits on; launch/tpu_pod.sh down withdraws it',
          status=3,
        )
      if state == 'ABSENT':
        raise PodError(
          f'{message}, and was not requested through a queue',
          'launch/tpu_pod.sh down deletes it; then up requests a new one',
        )
      say(f'{message}: it is given up')
      raise RetryLater('preempted')
    pause(15)


def remove_request(cloud: Cloud) -> None:
  """Deletes the queued resource with what it holds; it may be changing."""
  name = cloud.settings.tpu
  for attempt in range(10):
    if attempt:
      pause(30)
    answer = cloud.call(
      *('compute', 'tpus', 'queued-resources', 'delete', name, '--force'),
      limit=CHANGING,
    )
    if not answer.status or cloud.queue_state()[0] == 'ABSENT':
      return
  cloud.explain(answer.err)
  raise PodError(f'queued resource {name} cannot be deleted')


def take_down(cloud: Cloud, ask: bool = True) -> None:
  """Deletes the TPU, or the request for it."""
  name = cloud.settings.tpu
  state, _ = cloud.certain(cloud.queue_state)
  if state != 'ABSENT':
    _confirm(cloud, ask, f'delete TPU {name} ({state}) and its disks?')
    remove_request(cloud)
  else:
    tpu = cloud.certain(cloud.tpu_state)
    if tpu == 'ABSENT':
      say(f'there is no TPU {name} in {cloud.settings.zone}')
      return
    _confirm(cloud, ask, f'delete TPU {name} ({tpu}) and its disks?')
    words = 'compute', 'tpus', 'tpu-vm', 'delete', name
    answer = cloud.call(*words, limit=CHANGING)
    if answer.status:
      cloud.explain(answer.err)
      raise PodError(f'TPU {name} cannot be deleted')
  say(f'TPU {name} is deleted')


def _confirm(cloud: Cloud, ask: bool, question: str) -> None:
  if not ask or cloud.dry or cloud.settings.yes:
    return
  if not sys.stdin.isatty():
    raise PodError(f'{question} Nobody to ask: pass --yes')
  say(f'{question} [y/N]')
  if sys.stdin.readline().strip() not in ('y', 'Y', 'yes'):
    raise PodError('nothing was deleted')
