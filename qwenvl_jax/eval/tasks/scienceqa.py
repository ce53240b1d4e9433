"""ScienceQA, the questions with a picture: the paper's Table 4."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

from qwenvl_jax.data.readers import fields
from qwenvl_jax.errors import DataError
from qwenvl_jax.eval.benchmark import Split, figures
from qwenvl_jax.eval.choices import (
  CONTEXT,
  LETTERS,
  LIKELIEST,
  Choices,
  lettered,
  letters,
)
from qwenvl_jax.eval.task import Example, File, Prompt


@dataclasses.dataclass(frozen=True)
class ScienceQa(Choices):
  """The questions of a split that have a picture."""

  split: Split = Split('scienceqa', 'test')

  def check_examples(
    self, data_dir: pathlib.Path, examples: Sequence[Example], limited: bool
  ) -> None:
    """As `Benchmark`; all must be of the split that the authors list."""
    super().check_examples(data_dir, examples, limited)
    root = self.split.root(data_dir)
    listed = fields.load_json(root, 'pid_splits.json')
    wanted = set(map(str, fields.field(listed, 'test', 'pid_splits.json')))
    for example in examples:
      if example.key not in wanted:
        raise DataError(
          f'{self.name}: {root}: problem {example.key} is none of the test '
          'split in pid_splits.json; download both files again'
        )

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    for image, asked in self.split.pairs(data_dir):
      text = CONTEXT.format(
        asked.context or 'N/A', asked.question, lettered(asked.options)
      )
      yield Example(
        asked.id,
        Prompt((self.split.picture(data_dir, image, asked.id), text)),
        target=LETTERS[asked.options.index(asked.answer)],
        choices=letters(len(asked.options)),
      )


TASKS = (
  ScienceQa(
    'scienceqa_img',
    'ScienceQA test, with pictures',
    files=(
      *Split('scienceqa', 'test').files,
      File(
        'scienceqa/pid_splits.json',
        'pid_splits.json (https://scienceqa.github.io)',
      ),
    ),
    template=f'<img>{{}}</img>{CONTEXT}',
    postprocessing=LIKELIEST,
    paper=figures('accuracy', 67.1, 68.2),
    count=2017,
  ),
)
