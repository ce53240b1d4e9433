"""Looking at a pod, and ending what runs there."""

from pod.cloud import Cloud, is_lost, worker
from pod.log import PodError, say, show
from pod.supervise import Lock
from pod.watch import reports


def show_status(cloud: Cloud) -> int:
  s = cloud.settings
  queue = ' '.join(cloud.queue_state()).rstrip()
  tpu = cloud.tpu_state()
  show(f'TPU {s.tpu} in {s.zone}: {tpu} (queued resource: {queue})\n')
  alive, who = Lock(cloud).holder()
  if alive:
    show(f'looked after by {who}\n')
  elif queue not in ('ABSENT', 'UNKNOWN') or not is_lost(tpu):
    last = f' ({who} is gone)' if who else ''
    show(
      f'nobody looks after it{last}: it is not made anew if it is preempted, '
      'no budget ends it, and it is paid for until: launch/tpu_pod.sh down '
      f'--tpu {s.tpu}\n'
    )
  if tpu == 'UNKNOWN':
    cloud.explain(cloud.refusal)
    return 1
  if is_lost(tpu):
    return 0
  found = reports(cloud)
  if found is None:
    cloud.explain(cloud.refusal)
    raise PodError('the workers do not answer')
  for r in found:
    how = f' (exit {r.exit})' if r.state in ('exited', 'stopped') else ''
    show(
      f'worker {r.number}: {r.name} {r.state}{how} since {r.began}  {r.last}\n'
    )
  return 0


def check_unattended(cloud: Cloud) -> None:
  """Raises PodError if somebody would make a deleted TPU anew."""
  alive, who = Lock(cloud).holder()
  if alive and not cloud.dry:
    raise PodError(
      f'{who} looks after it, and would request it anew',
      'end that first: Ctrl-C there, or launch/tpu_pod.sh stop',
    )


def show_log(cloud: Cloud) -> int:
  s = cloud.settings
  if not s.follow:
    answer = cloud.on_workers(s.worker, worker('tail', s.lines))
    show(answer.out)
    if answer.status:
      cloud.explain(answer.err)
    return answer.status
  answer = cloud.on_workers(s.worker, worker('report'))
  fields = answer.out.split('\t')
  began = fields[3] if len(fields) == 7 else 'BEGAN'
  stream = cloud.stream(s.worker, worker('follow', began, 0))
  status = stream.finish()
  if status:
    cloud.explain(stream.error)
  return status


def stop_stage(cloud: Cloud) -> int:
  grace = cloud.settings.grace
  say(f'SIGTERM to all workers, which save; up to {grace} s')
  stream = cloud.stream('all', worker('stop', grace))
  if stream.finish(grace + 300):
    cloud.explain(stream.error)
    raise PodError('not all workers answered')
  return 0
