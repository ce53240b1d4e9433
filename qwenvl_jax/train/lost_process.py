"""The loss of a process, which ends the others of its run."""

from qwenvl_jax.errors import QwenVLError

# Exit status of the others when a process is lost: EX_TEMPFAIL of sysexits.h,
# "start the same command again".
LOST = 75


class LostProcessError(QwenVLError):
  """Another process of the run is gone, failed or does not come.

  Attributes:
    status: that this process ends with.
  """

  def __init__(self, message: str, status: int = LOST):
    super().__init__(message)
    self.status = status


def shown_numbers(values: list[int]) -> str:
  """The first of many numbers, and how many more there are."""
  shown = ', '.join(map(str, values[:16]))
  return shown + (f' and {len(values) - 16} more' if len(values) > 16 else '')
