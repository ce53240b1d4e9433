"""VQA soft accuracy: an answer counts as far as people agree on it.

Antol et al., 2015; the normalization is that of the scorer that the release
ships (`eval_mm/vqa_eval.py`), quirks included: true answers only lose their
punctuation.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The scorer means to spare a point between digits, which its misspelt look
# behind does not: only a digit after it does.
_POINT = re.compile(r'\.(?!\d)')
# It passes a flag in the place of the count: so many points go at most.
_MAX_POINTS = 32
_COMMA = re.compile(r'\d,\d')
_ARTICLES = ('a', 'an', 'the')
_WORDS = 'zero one two three four five six seven eight nine ten'
_NUMBERS = {word: str(i) for i, word in enumerate(_WORDS.split())} | {
  'none': '0'
}
_FORMS = (
  "ain't aren't can't could've couldn't couldn't've didn't doesn't don't "
  "hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's "
  "isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't "
  "must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
  "should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
  "someone'd someone'd've someone'll someone's something'd something'd've "
  "something'll that's there'd there'd've there're there's they'd they'd've "
  "they'll they're they've 'twas wasn't we'd've we've weren't what'll "
  "what're what's what've when's where'd where's where've who'd who'd've "
  "who'll who's who've why'll why're why's won't would've wouldn't "
  "wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
# The scorer's list: a form with any one of its apostrophes left out becomes it.
_CONTRACTIONS = {
  form[:i] + form[i + 1 :]: form
  for form in _FORMS.split()
  for i, character in enumerate(form)
  if character == "'"
} | {"somebody'd": 'somebodyd'}


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
  """Returns the soft accuracy of an answer, 0 to 1.

  The mean, over every way of leaving one person out, of a third of the others
  that gave this answer, at most 1.

  Args:
    prediction: normalized in full: punctuation, case, number words, articles,
      contractions.
    answers: of people, ten in the official files; punctuation goes where they
      are not all equal.

  >>> round(vqa_accuracy('A dog.', ['dog'] * 3 + ['cat'] * 7), 2)
  0.9
  """
  answers = [_one_line(answer) for answer in answers]
  if not answers:
    return 0.0
  if len(set(answers)) > 1:
    answers = [_without_punctuation(answer) for answer in answers]
  said = normalize(prediction)
  matches = [answer == said for answer in answers]
  total = sum(matches)
  return sum(min(1, (total - own) / 3) for own in matches) / len(answers)


def normalize(text: str) -> str:
  """Returns an answer as the official scorer compares it.

  >>> normalize('Two dogs, the  cat; dont!')
  "2 dogs cat don't"
  """
  words = _without_punctuation(_one_line(text)).lower().split()
  words = (_NUMBERS.get(word, word) for word in words)
  return ' '.join(
    _CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES
  )


def _one_line(text: str) -> str:
  return text.replace('\n', ' ').replace('\t', ' ').strip()


def _without_punctuation(text: str) -> str:
  out = text
  has_comma = _COMMA.search(text) is not None
  for mark in _PUNCTUATION:
    beside_space = f'{mark} ' in text or f' {mark}' in text
    out = out.replace(mark, '' if beside_space or has_comma else ' ')
  return _POINT.sub('', out, _MAX_POINTS)
