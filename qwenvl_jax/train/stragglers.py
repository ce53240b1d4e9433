"""Which host holds the others up: times of every process, compared."""

import statistics
from typing import Any

from qwenvl_jax.train.reporting import Window

# A host matters if its own work takes so much more than the median's, as a
# share of the step.
_MATTERS = 0.1

# And so many seconds: steps of milliseconds are no matter.
_SECONDS = 0.05


def times(window: Window, now: float) -> dict[str, float]:
  """What this process did with its time since the last record.

  Args:
    window: since then.
    now: seconds, of `time.perf_counter`.

  Returns:
    Seconds a step; of those, what passed otherwise than waiting for the devices
    (`own_seconds`: data and dispatch); the share of waiting for data.
  """
  seconds = max(now - window.began, 1e-9)
  steps = max(window.taken, 1)
  return {
    'step_seconds': seconds / steps,
    'own_seconds': max(seconds - window.settled, 0) / steps,
    'waiting_for_data': window.waited / seconds,
  }


def compare(all_times: list[dict[str, float]]) -> dict[str, float]:
  """Smallest, median and largest of each time, and who is slowest.

  All hosts take the same time for a step, since they wait for each other: the
  one that sets the pace waits for its devices least.

  Args:
    all_times: of each process, from `times`.

  Returns:
    Numbers for the log; nothing for a single process.
  """
  if len(all_times) < 2:
    return {}
  found: dict[str, Any] = {}
  for name in all_times[0]:
    values = [x[name] for x in all_times]
    found[f'hosts/{name}_min'] = min(values)
    found[f'hosts/{name}_median'] = statistics.median(values)
    found[f'hosts/{name}_max'] = max(values)
  own = [x['own_seconds'] for x in all_times]
  found['hosts/slowest'] = own.index(max(own))
  return found


def remark(compared: dict[str, float], all_times, name) -> str:
  """What to say of the slowest host: nothing if it hardly matters.

  Args:
    compared: from `compare`.
    all_times: from `times`.
    name: how a process is called.
  """
  if not compared:
    return ''
  lead = (
    compared['hosts/own_seconds_max'] - compared['hosts/own_seconds_median']
  )
  step = compared['hosts/step_seconds_median']
  if lead < max(_MATTERS * step, _SECONDS):
    return ''
  slowest = compared['hosts/slowest']
  waiting = all_times[slowest]['waiting_for_data']
  return f'slowest {name(slowest)}, waiting for data {waiting:.0%}'
