"""Progress bars and tables of the console commands."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  Task,
)
from rich.table import Column, Table
from rich.text import Text

from qwenvl_jax.errors import printable

# Seconds between two drawings.
_PAUSE = 0.1


# Columns of what is not for a terminal.
_WIDEST = 1000


class PrintableConsole(Console):
  """A console that spells out control characters in texts it is given.

  In a file or a pipe it has no edge at which it would cut cells of a table.
  """

  def __init__(self, **options):
    super().__init__(**options)
    if not self.is_terminal:
      self.width = max(self.width, _WIDEST)

  def render_str(self, text: str, **options) -> Text:
    return super().render_str(printable(text), **options)


def print_table(
  head: Iterable[str | Column], rows: Iterable[Sequence[str]], **style
) -> None:
  """Prints a table; `style` is Rich's."""
  shown = Table(*head, **style)
  for row in rows:
    shown.add_row(*row)
  PrintableConsole().print(shown)


class RateColumn(ProgressColumn):
  """How many are done a second."""

  def render(self, task: Task) -> Text:
    speed = task.finished_speed or task.speed
    return Text('' if speed is None else f'{speed:.1f}/s')


@contextlib.contextmanager
def bars(
  console: Console, *columns: ProgressColumn
) -> Iterator[Callable[[str, float, float], None]]:
  """Shows how far a long work is.

  Nothing is drawn before the first call: what is wrong with the input is found
  before, and should stand alone. The thread that calls draws. A thread of
  Rich's own would fail in the midst of TFDS's first use: that imports lazily,
  by changing what an import does for all threads, and Rich imports as it draws.

  Args:
    console: where to.
    *columns: of a bar; else description, bar, share, time left and counts.

  Yields:
    A function to call with what is being done, how far it is, and of how much.
    There is a bar for each description.
  """
  if not columns:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
  shown = Progress(*columns, console=console, auto_refresh=False)
  tasks, drawn = {}, -_PAUSE

  def say(what: str, done: float, total: float) -> None:
    nonlocal drawn
    if what not in tasks:
      shown.start()
      tasks[what] = shown.add_task(printable(what), total=total)
    now = time.monotonic()
    due = done >= total or now - drawn >= _PAUSE
    drawn = now if due else drawn
    shown.update(tasks[what], completed=done, total=total, refresh=due)

  try:
    yield say
  finally:
    if tasks:
      shown.stop()
