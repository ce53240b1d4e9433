"""A run: tasks asked and scored one after the other, into one folder."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax import buckets
from qwenvl_jax.eval import gallery, results, runner, tables
from qwenvl_jax.eval.answering import Model
from qwenvl_jax.eval.predictions import ALL, Shard
from qwenvl_jax.eval.runner import Outcome
from qwenvl_jax.eval.task import Example, Task

_FIGURES = 'figures.html'


@dataclasses.dataclass(frozen=True)
class Run:
  """Where a run reads and writes, and what it is of.

  Attributes:
    out: its folder.
    data_dir: files of the tasks.
    identity: of the model, see `answering.Model`.
    open_model: opens what answers, when something is to be asked.
    limit: see `runner.take`.
    shard: this process's share.
    pictures: figures of each task on the page.
  """

  out: Path
  data_dir: Path
  identity: Mapping[str, Any]
  open_model: Callable[[], Model]
  limit: int | None = None
  shard: Shard = ALL
  pictures: int = 50

  @functools.cached_property
  def _model(self) -> Model:
    return self.open_model()

  @functools.cached_property
  def _taken(self) -> dict[str, list[Example]]:
    """Examples that were checked and are to be asked, by task."""
    return {}

  def prepare(self, tasks: Sequence[Task]) -> None:
    """Checks everything that can be wrong, before a model is opened.

    Raises:
      DataError: a task's files are missing or wrong.
      ConfigError: the folder's answers are of another model or decoding.
    """
    about = {'model': dict(self.identity), 'versions': results.versions()}
    for task in tasks:
      self._taken[task.name] = runner.take(task, self.data_dir, self.limit)
    results.claim(self.out, about)
    for task in tasks:
      decoding = dataclasses.asdict(task.decoding)
      results.claim(self.out / task.name, {'decoding': decoding})

  def __call__(
    self,
    task: Task,
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> Outcome:
    """Asks and scores one task; writes its results if all is answered.

    Raises:
      DataError: its files are missing or wrong.
      ConfigError: the folder's answers are to other prompts.
    """
    folder = self.out / task.name
    examples = self._taken.pop(task.name, None)
    if examples is None:
      examples = runner.take(task, self.data_dir, self.limit)
    runner.ask(
      task, examples, lambda: self._model, folder, self.shard, progress
    )
    outcome = runner.score(task, examples, folder)
    if outcome.missing:
      return outcome
    summary = results.summarize(task, examples, outcome, self.identity)
    results.save(folder, task, summary, outcome.items)
    shown = gallery.worst(task, outcome.items, examples, self.pictures)
    buckets.write(
      folder / _FIGURES,
      gallery.figures(shown).encode('utf-8', 'backslashreplace'),
    )
    return outcome

  def write_tables(self) -> list[dict[str, Any]]:
    """Writes the run's tables and pages of all tasks that were scored.

    Returns:
      The tasks' summaries.
    """
    summaries = results.load_summaries(self.out)
    # What is not set is as the checkpoint has it.
    facts = {name: str(value) for name, value in self.identity.items() if value}
    buckets.write(self.out / 'results.md', tables.markdown(summaries))
    buckets.write(self.out / 'results.html', tables.page(summaries, facts))
    figures = {
      summary['task']: (summary['title'], path.read_text('utf-8'))
      for summary in summaries
      if (path := self.out / summary['task'] / _FIGURES).exists()
    }
    page = gallery.page('Worst first', figures)
    buckets.write(self.out / 'pictures.html', page)
    return summaries
