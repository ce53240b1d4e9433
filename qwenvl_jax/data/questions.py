"""Questions about scenes: the seven tasks of stage 2, as pure functions.

A *kind* is a function from a scene to what can be asked about it (`subjects`)
and from one subject to a `Question`. Sampling draws a kind, then a subject;
enumeration (for the vocabulary and the tests) walks through all of them.
"""

import random
from collections.abc import Iterable, Iterator, Mapping

from qwenvl_jax.data import things, wording
from qwenvl_jax.data.examples import Question
from qwenvl_jax.data.records import Scene, ScenePair

# Task (as in the paper's table 3) of every kind of question.
KINDS = {
  'caption': 'caption',
  'exist': 'vqa',
  'count': 'vqa',
  'colour': 'vqa',
  'left_of': 'vqa',
  'side': 'vqa',
  'grounded_caption': 'grounding',
  'refer': 'referring',
  'name_box': 'grounded_captioning',
  'ocr': 'ocr',
  'read': 'ocr',
  'translate': 'text',
  'compare': 'text',
}

# Questions of chats about two pictures, as `ScenePair`s.
PAIR_KINDS = ('which', 'nth_caption', 'nth_count', 'nth_colour')

# What stands between a plain prompt and its answer, where anything does.
_LEAD = {
  'en': {
    **{kind: ' ' for kind, task in KINDS.items() if task != 'text'},
    'refer': '',
    # Words are single tokens without a space before them (`things.WORDS`).
    'read': '',
    'name_box': ' is ',
    'compare': ' ',
  },
  'zh': {'name_box': '是'},
}

# Things whose centres are closer than this share of the side are not asked
# about as left and right.
MARGIN = 0.08


def ask(
  kind: str,
  scene: Scene | ScenePair,
  language: str,
  subject: object,
  chat: bool = False,
) -> Question:
  """The question of a kind about a subject (one of `subjects(kind, ..)`)."""
  wordings = (wording.CHAT if chat else wording.PLAIN)[language]
  arguments, answer, extra = _BUILD[kind](scene, language, subject)
  key = kind
  if kind == 'count' and subject != 'all':
    key = 'count_both' if isinstance(subject, tuple) else 'count'
  elif kind == 'count':
    key = 'count_all'
  prompt = wordings[key].format(*arguments)
  if not chat:
    answer = _LEAD[language].get(kind, '') + answer
  elif kind == 'refer':
    # A chat names what it found; the plain prompt is that phrase.
    answer = f'<ref>{arguments[0]}</ref>{answer}'
  task = KINDS.get(kind, 'pair')
  return Question(
    task=task,
    kind=kind,
    language=language,
    prompt=prompt,
    answer=answer,
    record=scene.id,
    objects=len(scene.objects),
    image=task != 'text',
    **extra,
  )


def subjects(kind: str, scene: Scene | ScenePair, classes: int) -> list:
  """Returns everything a kind can ask about a scene; empty if it cannot.

  Absent ones of the data's `classes` are asked for, too.

  Raises:
    KeyError: there is no such kind.
  """
  if kind in ('nth_caption', 'nth_colour'):
    return [(1,), (2,)]
  if kind in PAIR_KINDS:
    here, there = (set(x.classes) for x in scene)
    if kind == 'which':
      return [(x,) for x in sorted(here ^ there)]
    return [(n, x) for n in (1, 2) for x in sorted(here | there)]
  present = scene.classes
  single = [x for x in present if len(scene.of(x)) == 1]
  if kind in ('caption', 'grounded_caption', 'colour'):
    return [()]
  if kind == 'exist':
    return list(range(classes))
  if kind == 'count':
    pairs = [(a, b) for a in present for b in present if a < b]
    return ['all', *present, *pairs]
  if kind == 'left_of' or kind == 'compare':
    return [
      (a, b)
      for a in single
      for b in single
      if a != b and abs(_x(scene, a) - _x(scene, b)) >= MARGIN * scene.side
    ]
  if kind == 'side':
    middle, margin = scene.side / 2, MARGIN * scene.side
    return [x for x in single if abs(_x(scene, x) - middle) >= margin]
  if kind == 'refer':
    return list(present)
  if kind == 'name_box':
    return list(range(len(scene.objects)))
  if kind in ('ocr', 'read'):
    return [()] if scene.words else []
  if kind == 'translate':
    return ['caption', *present]
  raise KeyError(kind)


def draw(
  kind: str, scene: Scene | ScenePair, classes: int, rng: random.Random
) -> object | None:
  """A subject at random, or None: 'exist' is there in half of the cases."""
  if kind == 'exist':
    present = scene.classes
    if rng.random() < 0.5:
      return rng.choice(present)
    # At most a few tries: a scene holds few of the classes.
    while True:
      absent = rng.randrange(classes)
      if absent not in present:
        return absent
  found = subjects(kind, scene, classes)
  return rng.choice(found) if found else None


def sample(
  scene: Scene | ScenePair,
  rng: random.Random,
  weights: Mapping[str, float],
  count: int,
  *,
  classes: int,
  chinese: float = 0.5,
  chat: bool = False,
) -> list[Question]:
  """Up to `count` different questions about a scene.

  Args:
    scene: what is asked about.
    rng: decides.
    weights: how often each kind is drawn, e.g. {'caption': 1, 'refer': 2}.
    count: how many questions at most; a kind that the scene does not allow is
      drawn again.
    classes: how many of `things.THINGS` the data has.
    chinese: share of questions in Chinese.
    chat: worded for a chat.
  """
  kinds, shares = list(weights), list(weights.values())
  found = {}
  absent = 0  # Things asked for that are not there, less those that are.
  for kind in rng.choices(kinds, shares, k=3 * count):
    language = 'zh' if rng.random() < chinese else 'en'
    subject = draw(kind, scene, classes, rng)
    key = (kind, language, subject)
    if subject is None or key in found:
      continue
    if kind == 'exist':
      # There are more absent things to ask for: 'no' would be most answers.
      step = -1 if subject in scene.classes else 1
      if absent + step > 1:
        continue
      absent += step
    found[key] = ask(kind, scene, language, subject, chat)
    if len(found) == count:
      break
  return list(found.values())


def held_out(
  scene: Scene | ScenePair,
  kinds: Iterable[str],
  *,
  classes: int,
  seed: int = 0,
  chat: bool = False,
) -> list[Question]:
  """Questions to score a model on: one of each kind, in both languages.

  Both languages ask about the same subject. Kinds that the scene does not allow
  are left out: a scene with one object has no left and right of two.
  """
  asked = []
  for kind in kinds:
    name = scene.id.replace('+', '-')
    rng = random.Random(f'exam-{seed}-{kind}-{name}')
    subject = draw(kind, scene, classes, rng)
    if subject is not None:
      for language in things.LANGUAGES:
        asked.append(ask(kind, scene, language, subject, chat))
  return asked


def enumerate_all(
  scene: Scene | ScenePair,
  classes: int,
  chat: bool = False,
  kinds: Iterable[str] = tuple(KINDS),
) -> Iterator[Question]:
  """Every question of some kinds about a scene, in a fixed order."""
  for kind in kinds:
    for subject in subjects(kind, scene, classes):
      for language in things.LANGUAGES:
        yield ask(kind, scene, language, subject, chat)


def _x(scene, thing) -> float:
  return scene.of(thing)[0].x


# Each returns the prompt's arguments, the answer and further fields.


def _caption(scene, language, _):
  return (), wording.caption(scene, language), {}


def _grounded_caption(scene, language, _):
  boxes = [x for thing in scene.classes for x in scene.of(thing)]
  answer = wording.caption(scene, language, boxes=True)
  return (), answer, {'boxes': _boxes(scene, boxes)}


def _exist(scene, language, thing):
  there = wording.YES[language][bool(scene.of(thing))]
  return (wording.bare(thing, language),), there, {}


def _count(scene, language, subject):
  if subject == 'all':
    return (), str(len(scene.objects)), {}
  if isinstance(subject, tuple):
    total = sum(len(scene.of(x)) for x in subject)
    if language == 'en':
      names = [wording.many(x, language) for x in subject]
    else:
      names = [wording.bare(x, language) for x in subject]
    return names, str(total), {}
  names = (wording.many(subject, language),)
  return names, str(len(scene.of(subject))), {}


def _colour(scene, language, _):
  return (), scene.colour_name(language), {}


def _left_of(scene, language, subject):
  names = [wording.the(x, 1, language) for x in subject]
  is_left = _x(scene, subject[0]) < _x(scene, subject[1])
  return names, wording.TRUE[language][is_left], {}


def _compare(scene, language, subject):
  """Told which is left, asked the same or the reverse: no picture needed."""
  left, right = sorted(subject, key=lambda x: _x(scene, x))
  same = subject == (left, right)
  names = [wording.the(x, 1, language) for x in (left, right, *subject)]
  names[0] = names[0][:1].upper() + names[0][1:]
  return names, wording.TRUE[language][same], {}


def _side(scene, language, thing):
  right = _x(scene, thing) > scene.side / 2
  name = wording.the(thing, 1, language)
  return (name,), wording.SIDE[language][right], {}


def _refer(scene, language, thing):
  members = scene.of(thing)
  name = wording.the(thing, len(members), language)
  return (
    (name,),
    wording.box_text(scene, members),
    {'boxes': _boxes(scene, members)},
  )


def _name_box(scene, language, index):
  one = scene.objects[index]
  answer = wording.some(one.thing, 1, language)
  return (wording.box_text(scene, [one]),), answer, {}


def _ocr(scene, *_):
  return (), ''.join(wording.quad_text(scene, x) for x in scene.words), {}


def _read(scene, *_):
  return (), ' '.join(x.word for x in scene.words), {}


def _translate(scene, language, subject):
  other = 'zh' if language == 'en' else 'en'
  if subject == 'caption':
    texts = [wording.caption(scene, x) for x in (language, other)]
  else:
    count = len(scene.of(subject))
    texts = [wording.some(subject, count, x) for x in (language, other)]
  return (texts[0],), texts[1], {}


def _which(pair, language, subject):
  (thing,) = subject
  number = 1 if pair.first.of(thing) else 2
  return (wording.bare(thing, language),), str(number), {}


def _nth_caption(pair, language, subject):
  (number,) = subject
  return subject, wording.caption(pair[number - 1], language), {}


def _nth_count(pair, language, subject):
  number, thing = subject
  names = [wording.many(thing, language), number]
  if language == 'zh':
    names.reverse()
  return names, str(len(pair[number - 1].of(thing))), {}


def _nth_colour(pair, language, subject):
  (number,) = subject
  return subject, pair[number - 1].colour_name(language), {}


def _boxes(scene, objects):
  return tuple(wording.thousandths(scene.side, x.box) for x in objects)


_BUILD = {
  'caption': _caption,
  'exist': _exist,
  'count': _count,
  'colour': _colour,
  'left_of': _left_of,
  'side': _side,
  'grounded_caption': _grounded_caption,
  'refer': _refer,
  'name_box': _name_box,
  'ocr': _ocr,
  'read': _read,
  'translate': _translate,
  'compare': _compare,
  'which': _which,
  'nth_caption': _nth_caption,
  'nth_count': _nth_count,
  'nth_colour': _nth_colour,
}
