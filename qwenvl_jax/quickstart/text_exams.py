"""MMLU and C-Eval in small: questions about scenes that are told in words.

Tables in the official formats, of what the quickstart's decoder was trained on
as text. It does not know what a letter stands for, so that the options
themselves are scored, without solved questions before them.
"""

import csv
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwenvl_jax import buckets
from qwenvl_jax.data import questions, things, wording
from qwenvl_jax.data.examples import Question
from qwenvl_jax.data.records import Scene
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.task import File
from qwenvl_jax.eval.tasks.exams import Exam

_OPTIONS = 'ABCD'

# Kinds of questions with four possible answers.
SUBJECTS = ('count', 'colour', 'caption')

# Language to task that is made small: its title here.
_TASKS = {
  'en': ('mmlu', 'English, as MMLU'),
  'zh': ('ceval', 'Chinese, as C-Eval'),
}


def tasks() -> tuple[Exam, ...]:
  """Returns the tasks of the tables that `write` makes, English and Chinese."""
  return tuple(_task(*names) for names in _TASKS.values())


def _task(name: str, title: str) -> Exam:
  task = registry.get(name)
  return dataclasses.replace(
    task,
    name=f'scenes_as_{name}',
    title=title,
    files=tuple(
      File(file.path, 'made by python -m qwenvl_jax.quickstart.ablation text')
      for file in task.files
    ),
    template='{}',
    postprocessing='the option of the smallest mean cross entropy',
    paper={},
    count=0,
    form=dataclasses.replace(
      task.form, heading='', question='{}', subjects={}, lettered=False
    ),
    subjects=len(SUBJECTS),
    shots=0,
  )


def write(data_dir: Path, scenes: Sequence[Scene], seed: int = 0) -> None:
  """Writes the tables: a question of each kind about each scene.

  Raises:
    ConfigError: there are too few scenes for four options.
  """
  for (language, (name, _)), kind in (
    (names, kind) for names in _TASKS.items() for kind in SUBJECTS
  ):
    form = registry.get(name).form
    rng = random.Random(f'{seed}-{language}-{kind}')
    rows = list(_rows(scenes, kind, language, form.space, rng))
    for split, of in ((registry.get(name).split, rows), (form.dev, rows[:1])):
      path = data_dir / form.folder / form.path.format(split, kind)
      path.parent.mkdir(parents=True, exist_ok=True)
      with (
        buckets.atomic_write(path) as part,
        part.open('w', encoding='utf-8', newline='') as file,
      ):
        writer = csv.writer(file)
        if form.named:
          writer.writerow(form.columns)
        writer.writerows(of)


def _rows(
  scenes: Sequence[Scene],
  kind: str,
  language: str,
  space: str,
  rng: random.Random,
) -> Iterator[list[str]]:
  """Yields cells: the question, four options, the right one's letter."""
  for scene in scenes:
    subject = questions.draw(kind, scene, len(things.THINGS), rng)
    right = questions.ask(kind, scene, language, subject)
    # Each once, the right one first.
    found = dict.fromkeys(_answers(right, scenes, language, rng))
    options = list(found)[: len(_OPTIONS)]
    if len(options) < len(_OPTIONS):
      raise ConfigError(
        f'{len(scenes)} scenes have {len(options)} different answers to '
        f'{kind}; {len(_OPTIONS)} make a question: ask about more (--questions)'
      )
    rng.shuffle(options)
    told = wording.inventory(
      scene, rng.choice(things.LANGUAGES), rng, places=False
    )
    yield [
      told + right.prompt,
      *(option.removeprefix(space) for option in options),
      _OPTIONS[options.index(right.answer)],
    ]


def _answers(
  right: Question, scenes: Sequence[Scene], language: str, rng: random.Random
) -> Iterator[str]:
  """Yields the right answer, then others to questions of the same kind."""
  yield right.answer
  if right.kind == 'count':
    yield from (right.answer[:-1] + str(i) for i in range(1, 7))
    return
  for other in rng.sample(scenes, len(scenes)):
    yield questions.ask(right.kind, other, language, ()).answer
