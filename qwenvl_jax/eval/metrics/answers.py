"""Short answers: exact match, relaxed accuracy, ANLS."""

import re
from collections.abc import Sequence

import numpy as np

# Share of a number by which an answer to a chart may be off.
TOLERANCE = 0.05


def exact_match(prediction: str, target: str) -> float:
  """Returns 1 if both are equal but for case and outer white space, else 0."""
  return float(prediction.strip().lower() == target.strip().lower())


def relaxed_accuracy(prediction: str, target: str) -> float:
  """Returns 1 if an answer to a chart is right (ChartQA, section 5.1), else 0.

  Numbers count within 5% of the target; `45%` is 0.45, `1,000` is no number.
  All else, and a target of 0, must be equal but for case.

  >>> relaxed_accuracy('2020', '2019'), relaxed_accuracy('0.01', '0')
  (1.0, 0.0)
  """
  prediction = prediction.strip()
  said, true = _number(prediction), _number(target)
  if said is None or not true:
    return float(prediction.lower() == target.lower())
  return float(abs(said - true) / abs(true) <= TOLERANCE)


def relaxed_accuracy_release(prediction: str, target: str) -> float:
  """As `relaxed_accuracy` with 5% of the answer, not of the target.

  The release hands the two to its function in the wrong order.

  >>> relaxed_accuracy('95', '100'), relaxed_accuracy_release('95', '100')
  (1.0, 0.0)
  """
  return relaxed_accuracy(target, prediction.strip())


def _number(text: str) -> float | None:
  try:
    if text.endswith('%'):
      return float(text.rstrip('%')) / 100
    return float(text)
  except ValueError:
    return None


def anls(
  prediction: str, answers: Sequence[str], threshold: float = 0.5
) -> float:
  """Returns the average normalized Levenshtein similarity of one answer, 0-1.

  Biten et al., 2019; DocVQA's scorer. Case and runs of white space do not
  count; the best of the true answers does, if it is at least `threshold`.

  >>> anls('ITC Ltd', ['itc  limited'])
  0.6363636363636364
  """
  said = ' '.join(prediction.lower().split())
  best = 0.0
  for answer in answers:
    true = ' '.join(answer.lower().split())
    longer = max(len(said), len(true))
    # A bound by the lengths alone spares long answers the work.
    if longer and min(len(said), len(true)) < threshold * longer:
      continue
    distance = levenshtein(said, true)
    best = max(best, 1 - distance / longer if longer else 1.0)
  return best if best >= threshold else 0.0


def levenshtein(first: str, second: str) -> int:
  """Returns the fewest insertions, deletions and replacements between texts."""
  others = np.array([*map(ord, second)], np.int64)
  steps = np.arange(len(second) + 1)
  row = steps
  for number, character in enumerate(first, 1):
    new = np.concatenate([[number], row[:-1] + (others != ord(character))])
    new = np.minimum(new, row + 1)
    # An insertion costs one a character: the running minimum without them.
    row = np.minimum.accumulate(new - steps) + steps
  return int(row[-1])


_GQA_END = re.compile('[.,!]')
# What the release cuts, in its order.
_GQA_BEFORE = ('is', 'are', 'a', 'an', 'the')


def gqa_answer(text: str) -> str:
  """Returns the noun of an answer in a sentence, as GQA's answers are.

  What stands before `is`, `are` or an article goes, and what follows `of`.

  >>> gqa_answer('It is a pizza slice.')
  'pizza slice'
  """
  said = _GQA_END.split(text.strip())[0].lower()
  for word in _GQA_BEFORE:
    pieces = re.split(rf'\b{word} ', said, maxsplit=1)
    said = pieces[1] if len(pieces) > 1 else said
  return re.split(r' of\b', said)[0].strip()


def gqa_answer_release(text: str) -> str:
  """As `gqa_answer` as the release does it: within words, too.

  >>> gqa_answer_release('pizza slice')
  'slice'
  """
  said = _GQA_END.split(text.strip())[0].lower()
  for word in _GQA_BEFORE:
    said = said.split(f'{word} ')[1] if f'{word} ' in said else said
  return said.split(' of')[0].strip()


def yes_or_no(text: str) -> str:
  """Returns 'yes', 'no' or 'other': MME's scorer reads four characters.

  >>> yes_or_no('Yes, it is.'), yes_or_no('I cannot tell')
  ('yes', 'other')
  """
  start = text.strip().lower()[:4]
  return next((word for word in ('yes', 'no') if word in start), 'other')
