"""Text only: MMLU, C-Eval and CMMLU, the paper's Appendix E.4."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

from qwenvl_jax.errors import DataError, did_you_mean
from qwenvl_jax.eval.annotations import subjects
from qwenvl_jax.eval.annotations.rows import rows
from qwenvl_jax.eval.benchmark import figures
from qwenvl_jax.eval.choices import LETTERS, LIKELIEST, Choices, lettered
from qwenvl_jax.eval.task import Example, File, Prompt

_FOUR = LETTERS[:4]


@dataclasses.dataclass(frozen=True)
class Form:
  """How a benchmark's tables lie, and its authors' prompt.

  Attributes:
    folder: below the data folder.
    path: of a table, from split and subject.
    dev: the split that the solved examples are from.
    columns: question, options and answer, by name.
    heading: before the examples, with the subject.
    question: of one question, from question and options.
    space: between the prompt and an answer.
    named: whether a row of names comes first.
    subjects: what the heading calls them; without their names, the file's, its
      underlines blanks.
    lettered: whether the answers are letters; False to score the options
      themselves, of models that do not know what a letter stands for.
  """

  folder: str
  path: str
  dev: str
  columns: tuple[str, ...]
  heading: str
  question: str
  space: str = ''
  named: bool = True
  subjects: Mapping[str, str] = dataclasses.field(default_factory=dict)
  lettered: bool = True

  def heading_of(self, subject: str) -> str:
    """Returns the heading of a subject; DataError if there is none such."""
    if self.subjects and subject not in self.subjects:
      near = did_you_mean(subject, self.subjects)
      raise DataError(
        f'{self.folder}: no subject is called {subject!r}{near}; download it '
        'again'
      )
    name = self.subjects.get(subject, subject.replace('_', ' '))
    return self.heading.format(name)


@dataclasses.dataclass(frozen=True)
class Exam(Choices):
  """Questions of many subjects, after five solved ones of the same.

  Attributes:
    form: of the files.
    split: that is asked.
    subjects: how many there are.
    shots: how many solved questions stand before each.
  """

  form: Form = Form('', '', '', (), '', '')
  split: str = 'test'
  subjects: int = 0
  shots: int = 5

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    for subject in self._subjects(data_dir):
      solved = ''
      found = list(self._rows(data_dir, self.form.dev, subject))
      if len(found) < self.shots:
        raise DataError(
          f'{self.name}: {subject}: {len(found)} solved questions of '
          f'{self.shots}; download {self.form.folder} again'
        )
      for _, question, choices, answer in found[: self.shots]:
        solved += f'{question}{choices[_FOUR.index(answer)]}\n\n'
      heading = self.form.heading_of(subject)
      for number, question, choices, answer in self._rows(
        data_dir, self.split, subject
      ):
        yield Example(
          f'{subject}/{number}',
          Prompt((heading + solved + question,)),
          target=answer,
          choices=choices,
          category=subject,
        )

  def parse(self, text: str, example: Example) -> str:
    """Returns the letter of the likeliest choice; '' of what is none."""
    if self.form.lettered:
      return super().parse(text, example)
    said = [choice.strip() for choice in example.choices]
    return _FOUR[said.index(text.strip())] if text.strip() in said else ''

  def check(self, data_dir: pathlib.Path) -> None:
    """As `Benchmark.check`; and that no subject is missing."""
    found = self._subjects(data_dir)
    if self.subjects and len(found) != self.subjects:
      raise DataError(
        f'{self.name}: {len(found)} subjects in {data_dir / self.form.folder}, '
        f'but there are {self.subjects}; it is {self.files[0].source}'
      )
    super().check(data_dir)

  def _subjects(self, data_dir: pathlib.Path) -> list[str]:
    before, after = self.form.path.format(self.split, '\0').split('\0')
    found = (data_dir / self.form.folder).glob(f'{before}*{after}')
    return sorted(
      path.name.removesuffix(after) for path in found if path.name[0] != '.'
    )

  def _rows(self, data_dir, split: str, subject: str):
    file = data_dir / self.form.folder / self.form.path.format(split, subject)
    names = self.form.columns
    table = rows(file, names) if self.form.named else rows(file, names=names)
    question, *options, answer = names
    for number, (record, row) in enumerate(table):
      letter = row[answer].upper()
      if letter not in tuple(_FOUR):
        raise DataError(
          f'{split}/{record}: {row[answer]!r:.40} is none of A, B, C, D'
        )
      said = [row[option] for option in options]
      text = self.form.question.format(row[question], lettered(said))
      choices = _FOUR if self.form.lettered else said
      yield number, text, tuple(self.form.space + x for x in choices), letter


_COLUMNS = ('question', 'A', 'B', 'C', 'D', 'answer')
_MMLU = Form(
  'MMLU',
  '{0}/{1}_{0}.csv',
  'dev',
  _COLUMNS,
  'The following are multiple choice questions (with answers) about {}.\n\n',
  '{}\n{}\nAnswer:',
  ' ',
  named=False,
)
_CEVAL = Form(
  'C-Eval',
  '{0}/{1}_{0}.csv',
  'dev',
  _COLUMNS,
  '以下是中国关于{}考试的单项选择题，请选出其中的正确答案。\n\n',
  '{}\n{}\n答案：',
  subjects=subjects.CEVAL,
)
_CMMLU = Form(
  'CMMLU',
  '{0}/{1}.csv',
  'dev',
  ('Question', 'A', 'B', 'C', 'D', 'Answer'),
  '以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n',
  '题目：{}\n{}\n答案是：',
  subjects=subjects.CMMLU,
)


def _exam(
  name: str,
  title: str,
  form: Form,
  split: str,
  source: str,
  subjects: int,
  count: int,
  figure: float,
) -> Exam:
  return Exam(
    name,
    title,
    files=tuple(File(f'{form.folder}/{x}', source) for x in (split, form.dev)),
    template=f'{form.heading}5 x ({form.question} {{}}), {form.question}',
    postprocessing=LIKELIEST,
    paper=figures('accuracy', figure),
    count=count,
    form=form,
    split=split,
    subjects=subjects,
  )


TASKS = (
  _exam(
    'mmlu', 'MMLU test, 5 shots', _MMLU, 'test',
    'data.tar of https://github.com/hendrycks/test, its folders dev and test',
    57, 14042, 50.7,
  ),
  _exam(
    'ceval', 'C-Eval val, 5 shots', _CEVAL, 'val',
    'ceval-exam.zip of https://huggingface.co/datasets/ceval/ceval-exam', 52,
    1346, 51.1,
  ),
  _exam(
    'cmmlu', 'CMMLU test, 5 shots', _CMMLU, 'test',
    'cmmlu_v1_0_1.zip of https://huggingface.co/datasets/haonan-li/cmmlu', 67,
    11582, 49.5,
  ),
)  # fmt: skip
