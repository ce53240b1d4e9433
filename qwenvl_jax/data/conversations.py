"""Stage 3 of the quickstart: conversations about scenes.

About one picture, two, or none; `text.chatml` says how they are written.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

from qwenvl_jax.data import things, wording
from qwenvl_jax.data.examples import Question, Sample
from qwenvl_jax.data.records import Scene
from qwenvl_jax.text import chatml
from qwenvl_jax.text.chatml import TextSpan

# Questions about two pictures, beside those about one.
PAIR_KINDS = ('which', 'nth_caption', 'nth_count', 'nth_colour')


def sample(
  record: str,
  pictures: Sequence[TextSpan],
  conversations: Sequence[Sequence[Question]],
  images: Sequence[object] = (),
) -> Sample:
  """Makes a sample of several conversations about the same pictures.

  Args:
    record: names the sample in errors.
    pictures: one image span each, or words in its place.
    conversations: each is questions asked one after the other.
    images: what fills the image spans.
  """
  prefix = chatml.turn_spans('system', chatml.DEFAULT_SYSTEM)
  prefix += chatml.open_turn('user')
  for number, span in enumerate(pictures, start=1):
    prefix += (TextSpan(f'Picture {number}: '), span, TextSpan('\n'))
  return Sample(
    record=record,
    prefix=prefix,
    continuations=tuple(map(_continuation, conversations)),
    images=tuple(images),
  )


def _continuation(turns: Sequence[Question]) -> tuple[TextSpan, ...]:
  """The turns, but for the beginning of the first, which the prefix holds."""
  spans = ()
  for number, asked in enumerate(turns):
    spans += chatml.open_turn('user') if number else ()
    spans += (TextSpan(asked.prompt), *chatml.CLOSE_TURN)
    spans += chatml.turn_spans('assistant', asked.answer)
  return spans


def pair_subjects(
  kind: str, first: Scene, second: Scene
) -> list[tuple[int, ...]]:
  """Returns everything a kind can ask about two scenes.

  Args:
    kind: one of `PAIR_KINDS`.
    first: the first scene.
    second: the second one.

  Raises:
    KeyError: there is no such kind.
  """
  here, there = set(first.classes), set(second.classes)
  if kind == 'which':
    return [(x,) for x in sorted(here ^ there)]
  if kind == 'nth_count':
    return [(n, x) for n in (1, 2) for x in sorted(here | there)]
  if kind in ('nth_caption', 'nth_colour'):
    return [(1,), (2,)]
  raise KeyError(kind)


def ask_pair(
  kind: str,
  first: Scene,
  second: Scene,
  language: str,
  subject: tuple[int, ...],
) -> Question:
  """A question about two pictures; `subject` is one of `pair_subjects`."""
  arguments, answer = _ask_pair(kind, (first, second), language, subject)
  return Question(
    task='pair',
    kind=kind,
    language=language,
    prompt=wording.CHAT[language][kind].format(*arguments),
    answer=answer,
    record=f'{first.id}+{second.id}',
    objects=len(first.objects) + len(second.objects),
  )


def _ask_pair(kind, scenes, language, subject):
  if kind == 'which':
    (thing,) = subject
    number = 1 if scenes[0].of(thing) else 2
    return (wording.bare(thing, language),), str(number)
  number, *rest = subject
  scene = scenes[number - 1]
  if kind == 'nth_caption':
    return (number,), wording.caption(scene, language)
  if kind == 'nth_colour':
    return (number,), scene.colour_name(language)
  names = [wording.many(rest[0], language), number]
  if language == 'zh':
    names.reverse()
  return names, str(len(scene.of(rest[0])))


def sample_pair(
  first: Scene,
  second: Scene,
  rng: random.Random,
  weights: Mapping[str, float],
  count: int,
  chinese: float = 0.5,
) -> list[Question]:
  """Up to `count` different questions about two scenes.

  Args:
    first: what `Picture 1` shows.
    second: what `Picture 2` shows.
    rng: decides.
    weights: how often each kind is drawn, e.g. {'which': 1, 'nth_count': 2}.
    count: how many questions at most.
    chinese: share of questions in Chinese.
  """
  kinds, shares = list(weights), list(weights.values())
  found = {}
  for kind in rng.choices(kinds, shares, k=3 * count):
    language = 'zh' if rng.random() < chinese else 'en'
    possible = pair_subjects(kind, first, second)
    if not possible:
      continue
    subject = rng.choice(possible)
    found[kind, language, subject] = (kind, first, second, language, subject)
    if len(found) == count:
      break
  return [ask_pair(*arguments) for arguments in found.values()]


def exam_pair(first: Scene, second: Scene, seed: int = 0) -> list[Question]:
  """Questions about two scenes to score a model on.

  One of each kind that the scenes allow, of the same subject in both languages.

  Args:
    first: what `Picture 1` shows.
    second: what `Picture 2` shows.
    seed: other subjects for another seed.
  """
  asked = []
  for kind in PAIR_KINDS:
    rng = random.Random(f'exam-{seed}-{kind}-{first.id}-{second.id}')
    possible = pair_subjects(kind, first, second)
    if possible:
      subject = rng.choice(possible)
      asked += [
        ask_pair(kind, first, second, language, subject)
        for language in things.LANGUAGES
      ]
  return asked


def enumerate_pair(first: Scene, second: Scene) -> Iterator[Question]:
  """Every question about two scenes, in a fixed order."""
  for kind in PAIR_KINDS:
    for subject in pair_subjects(kind, first, second):
      for language in things.LANGUAGES:
        yield ask_pair(kind, first, second, language, subject)
