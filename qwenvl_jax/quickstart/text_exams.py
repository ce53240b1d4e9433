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
from qwenvl_jax.eval import registry
from qwenvl_jax.eval.task import File
from qwenvl_jax.eval.tasks.exams import Exam

_OPTIONS = 'ABCD'

# Kinds of questions with four possible answers, and whether they need to be
# told where things are.
SUBJECTS = {'count': False, 'colour': False, 'caption': False, 'name_box': True}

# Language to task that is made small: its title here.
_TASKS = {
  'en': ('mmlu', 'English, in the form of MMLU'),
  'zh': ('ceval', 'Chinese, in the form of C-Eval'),
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
      task.form, heading='', question='{}', lettered=False
    ),
    subjects=len(SUBJECTS),
    shots=0,
  )


def write(
  data_dir: Path, scenes: Sequence[Scene], classes: int = 16, seed: int = 0
) -> None:
  """Writes the tables: a question of each kind about each scene.

  Args:
    data_dir: where the tasks read them.
    scenes: at least two, of different contents.
    classes: how many of `things.THINGS` they are of.
    seed: of the wrong options and their order.
  """
  for (language, (name, _)), kind in (
    (names, kind) for names in _TASKS.items() for kind in SUBJECTS
  ):
    form = registry.get(name).form
    rng = random.Random(f'{seed}-{language}-{kind}')
    rows = list(_rows(scenes, kind, language, classes, form.space, rng))
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
  scenes: Sequence[Scene], kind: str, language: str, classes: int, space: str,
  rng: random.Random,
) -> Iterator[list[str]]:  # fmt: skip
  """Yields cells: the question, four options, the right one's letter."""
  for index, scene in enumerate(scenes):
    subject = questions.draw(kind, scene, classes, rng)
    right = questions.ask(kind, scene, language, subject)
    others = dict.fromkeys(
      _others(right, scenes, index, language, classes, rng)
    )
    others.pop(right.answer, None)
    options = [right.answer, *list(others)[: len(_OPTIONS) - 1]]
    rng.shuffle(options)
    told = wording.inventory(
      scene, rng.choice(things.LANGUAGES), rng, SUBJECTS[kind]
    )
    yield [
      told + right.prompt,
      *(option.removeprefix(space) for option in options),
      _OPTIONS[options.index(right.answer)],
    ]


def _others(
  right: Question,
  scenes: Sequence[Scene],
  index: int,
  language: str,
  classes: int,
  rng: random.Random,
) -> Iterator[str]:
  """Yields answers to the same kind of question, what misleads most first."""
  kind, scene = right.kind, scenes[index]
  if kind == 'count':
    yield from (right.answer[:-1] + str(i) for i in range(1, 7))
    return
  if kind == 'name_box':
    # Things that are there, but elsewhere.
    for number in range(len(scene.objects)):
      yield questions.ask(kind, scene, language, number).answer
  for other in rng.sample(scenes, len(scenes)):
    subject = questions.draw(kind, other, classes, rng)
    yield questions.ask(kind, other, language, subject).answer
