"""Which host holds the others up: times of every process, compared."""

import statistics
from collections.abc import Callable

# A host matters if its own work takes so much more than the median's, as a
# share of the step.
_MATTERS = 0.1

# And so many seconds: steps of milliseconds are no matter.
_SECONDS = 0.05


def compare(
  all_times: list[dict[str, float]], name: Callable[[int], str]
) -> tuple[dict[str, float], str]:
  """Smallest, median and largest of each time, and who is slowest.

  All hosts take the same time for a step, since they wait for each other: the
  one that sets the pace waits for its devices least.

  Args:
    all_times: of each process, from `Window.times`.
    name: how a process is called.

  Returns:
    Numbers for the log, none of a single process; what to say of the slowest
    host, nothing if it hardly matters.
  """
  if len(all_times) < 2:
    return {}, ''
  found = {}
  for key in all_times[0]:
    values = [x[key] for x in all_times]
    found[f'hosts/{key}_min'] = min(values)
    found[f'hosts/{key}_median'] = statistics.median(values)
    found[f'hosts/{key}_max'] = max(values)
  own = [x['own_seconds'] for x in all_times]
  slowest = found['hosts/slowest'] = own.index(max(own))
  lead = max(own) - found['hosts/own_seconds_median']
  if lead < max(_MATTERS * found['hosts/step_seconds_median'], _SECONDS):
    return found, ''
  waiting = all_times[slowest]['waiting_for_data']
  return found, f'slowest {name(slowest)}, waiting for data {waiting:.0%}'
