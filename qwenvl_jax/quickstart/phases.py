"""The quickstart's phases: which one runs, and how long all of them take."""

import time
from collections.abc import Sequence

# Seconds on two CPU cores, the compilation included.
EXPECTED = {
  'data': 20,
  'decoder': 190,
  'vision': 160,
  'stage1': 330,
  'stage2': 400,
  'stage3': 320,
  'evaluation': 110,
}


class Phases:
  """Says which phase begins, of how many, and estimates the time left.

  Estimates are `EXPECTED`, by how much faster or slower this machine was in the
  phases that it has run.
  """

  def __init__(self, names: Sequence[str], estimated: bool = True):
    """Plans a run.

    Of other runs than the quickstart on a CPU, nothing is estimated.
    """
    self._names = tuple(names)
    self._estimated = estimated
    self._seconds: dict[str, float] = {}
    self._done: set[str] = set()

  def begin(self, name: str) -> None:
    """Prints that a phase begins."""
    self._began = time.monotonic()
    number = self._names.index(name) + 1
    print(f'\n== phase {number} of {len(self._names)}: {name}', end='')
    left = self.left()
    if left is not None:
      print(f' (all that is left: about {_minutes(left)})', end='')
    print(flush=True)

  def end(self, name: str) -> float:
    """Notes that a phase has ended; returns the seconds that it took."""
    self._seconds[name] = time.monotonic() - self._began
    self._done.add(name)
    return self._seconds[name]

  def skip(self, name: str) -> None:
    """Notes that a phase was finished before."""
    self._done.add(name)

  def left(self) -> float | None:
    """Seconds that the phases not yet done will take, None if unknown."""
    if not self._estimated:
      return None
    expected = sum(EXPECTED[name] for name in self._seconds)
    pace = sum(self._seconds.values()) / expected if expected else 1.0
    rest = sum(EXPECTED[x] for x in self._names if x not in self._done)
    return rest * pace


def _minutes(seconds: float) -> str:
  minutes = max(round(seconds / 60), 1)
  return f'{minutes} minute{"s" if minutes > 1 else ""}'
