"""Captions: NoCaps and Flickr30K, the paper's Table 4 and Figure 4."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence

from qwenvl_jax.eval import shots
from qwenvl_jax.eval.benchmark import Benchmark, Split, figures
from qwenvl_jax.eval.metrics.captions import score_captions
from qwenvl_jax.eval.task import Decoding, Example, Item, Prompt, Scores

_PROMPT = 'Describe the image in English:'


@dataclasses.dataclass(frozen=True)
class Captions(Benchmark):
  """Pictures to be described, beside what people wrote.

  Attributes:
    split: the pictures.
    train: what few-shot examples are drawn from.
    shots: how many.
    seed: of the draw.
  """

  split: Split = Split('flickr30k', 'test')
  train: Split = Split('flickr30k', 'train')
  shots: int = 0
  seed: int = 0

  def examples(self, data_dir: pathlib.Path) -> Iterable[Example]:
    pool = []
    if self.shots:
      # As in the release, a caption is drawn, not a picture.
      pool = [
        (record, caption)
        for record in self.train.records(data_dir)
        for caption in record.captions
      ]
    for record in self.split.records(data_dir):
      parts = []
      for drawn, caption in shots.draw(pool, self.shots, self.seed, record.id):
        picture = self.train.picture(data_dir, drawn.images[0], drawn.id)
        parts += [picture, f'{_PROMPT} {caption}']
      picture = self.split.picture(data_dir, record.images[0], record.id)
      yield Example(
        record.id,
        Prompt((*parts, picture, _PROMPT)),
        target=list(record.captions),
      )

  def score_all(
    self, items: Sequence[Item], folder: pathlib.Path
  ) -> list[Scores]:
    """CIDEr and ROUGE-L of each caption; BLEU-4 and METEOR of the corpus."""
    del folder
    if not items:
      return []
    scores = score_captions(
      {item.example.key: item.answer for item in items},
      {item.example.key: item.example.target for item in items},
    )
    return [
      scores.corpus
      | {
        'cider': scores.cider[item.example.key],
        'rouge_l': scores.rouge_l[item.example.key],
      }
      for item in items
    ]


def _task(
  name: str,
  title: str,
  split: Split,
  count: int,
  paper: tuple[float, float],
) -> Captions:
  return Captions(
    name,
    title,
    'cider',
    Decoding(max_tokens=30, min_tokens=8),
    split.files,
    f'<img>{{}}</img>{_PROMPT}',
    'PTB tokens in lower case without punctuation',
    figures('cider', *paper),
    count=count,
    split=split,
  )


def _few_shot(
  task: Captions, count: int, train: Split, suffix: str = ''
) -> Captions:
  from_test = ', examples from the test file' if suffix else ''
  return dataclasses.replace(
    task,
    name=f'{task.name}_{count}shot{suffix}',
    title=f'{task.title}, {count} shot{"s" * (count > 1)}{from_test}',
    template=f'{count} x (<img>{{}}</img>{_PROMPT} {{}}), {task.template}',
    paper={},
    train=train,
    shots=count,
  )


_FLICKR = _task(
  'flickr30k_test', 'Flickr30K Karpathy test', Split('flickr30k', 'test'), 1000,
  (85.8, 81.0),
)  # fmt: skip

TASKS = (
  _task(
    'nocaps_val', 'NoCaps val', Split('nocaps', 'val'), 4500, (121.4, 120.2)
  ),
  _FLICKR,
  *(
    _few_shot(_FLICKR, count, Split('flickr30k', split), suffix)
    for split, suffix in (('train', ''), ('test', '_release'))
    for count in shots.NUMBERS
  ),
)
