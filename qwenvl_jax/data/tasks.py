"""From a record to the samples of a row: what a stage asks, and how often.

Each class is a function `(record, rng, another) -> [Sample, ..]` with settings:
`rng` decides everything, `another()` gives a further record at random. The
first sample is the one with the picture; pure text follows in samples of its
own. More branches are offered than may fit: rows drop what does not.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence

from qwenvl_jax.data import questions, things, wording
from qwenvl_jax.data.examples import Question, Sample, plain
from qwenvl_jax.data.records import Scene, ScenePair
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text import chatml
from qwenvl_jax.text.chatml import TextSpan

# Relative frequency of the kinds of questions in stage 2; coordinates and
# names need the most practice.
MULTITASK = {
  'caption': 2.0,
  'exist': 2.0,
  'count': 2.0,
  'colour': 1.0,
  'left_of': 1.0,
  'side': 0.5,
  'grounded_caption': 1.0,
  'refer': 4.0,
  'name_box': 2.0,
  'ocr': 1.0,
  'translate': 0.5,
  'compare': 0.25,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneTasks:
  """What the tasks about scenes have in common.

  Attributes:
    kinds: relative frequency of the kinds of questions (`questions.KINDS`).
    branches: questions for one picture; 0 for one question without branches.
    classes: how many of `things.THINGS` the data has.
    chinese: share of questions in Chinese.
    in_words: describe each picture in words instead of showing it: text for a
      decoder that has no eyes yet.
    places: whether such a description says where things are; without, `kinds`
      should not ask for it.
  """

  kinds: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: dict(MULTITASK)
  )
  branches: int = 6
  classes: int = 16
  chinese: float = 0.5
  in_words: bool = False
  places: bool = True

  def __post_init__(self):
    self._check('kinds', questions.KINDS)

  def _check(self, key: str, known: Iterable[str]) -> None:
    kinds = getattr(self, key)
    for kind in kinds:
      if kind not in known:
        raise ConfigError(
          f'{type(self).__name__}.{key} names {kind!r}, which is none of '
          f'{", ".join(known)}'
        )
    if not kinds:
      raise ConfigError(f'{type(self).__name__}.{key} is empty; name a kind')

  def _ask(
    self, scene, rng, count: int, chat: bool = False, kinds=None
  ) -> list[Question]:
    return questions.sample(
      scene,
      rng,
      kinds or self.kinds,
      count,
      classes=self.classes,
      chinese=self.chinese,
      chat=chat,
    )

  def _span(self, scene: Scene, number: int, rng) -> TextSpan:
    if not self.in_words:
      return TextSpan(f'<img>{number}</img>')
    language = rng.choice(things.LANGUAGES)
    return TextSpan(wording.inventory(scene, language, rng, self.places))

  def _images(self, *scenes: Scene) -> tuple[object, ...]:
    return () if self.in_words else tuple(x.image for x in scenes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions(SceneTasks):
  """Stages 1 and 2: `<img>..</img>PROMPT ANSWER<|endoftext|>`.

  Attributes:
    spaceless: share of answers without the space before them, as a text may
      have them: 'yes' and ' yes' are different tokens that mean the same.
  """

  spaceless: float = 0.0

  def __call__(
    self, record: Scene, rng: random.Random, another: Callable[[], Scene]
  ) -> list[Sample]:
    asked = self._ask(record, rng, max(self.branches, 1))
    if self.spaceless:
      asked = [
        dataclasses.replace(x, answer=x.answer.removeprefix(' '))
        if rng.random() < self.spaceless
        else x
        for x in asked
      ]
    samples = []
    seen = [x.spans() for x in asked if x.image]
    if seen:
      samples.append(
        Sample(
          record=record.id,
          prefix=(self._span(record, 0, rng),),
          continuations=tuple(seen),
          images=self._images(record),
        )
      )
    for question in asked:
      if not question.image:
        samples.append(Sample(record.id, question.spans()))
    return samples if self.branches else [plain(x) for x in samples]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chats(SceneTasks):
  """Stage 3: ChatML conversations.

  Attributes:
    turns: most questions in one conversation.
    two: share of samples with two pictures.
    pairs: relative frequency of the kinds of questions about two pictures
      (`questions.PAIR_KINDS`).
    text: share of rows that also hold a conversation without a picture.
  """

  turns: int = 2
  two: float = 0.25
  pairs: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: dict.fromkeys(questions.PAIR_KINDS, 1.0)
  )
  text: float = 0.1
  kinds: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {
      k: v for k, v in MULTITASK.items() if questions.KINDS[k] != 'text'
    }
  )

  def __post_init__(self):
    super().__post_init__()
    self._check('pairs', questions.PAIR_KINDS)

  def __call__(
    self, record: Scene, rng: random.Random, another: Callable[[], Scene]
  ) -> list[Sample]:
    wanted = max(self.branches, 1)
    scenes = [record]
    if rng.random() < self.two:
      scenes.append(another())
      pair = ScenePair(*scenes)
      asked = self._ask(
        pair, rng, wanted * self.turns, chat=True, kinds=self.pairs
      )
    else:
      asked = self._ask(record, rng, wanted * self.turns, chat=True)
    if not asked:
      return []
    samples = [
      chat(
        '+'.join(x.id for x in scenes),
        [self._span(x, i, rng) for i, x in enumerate(scenes)],
        self._split(asked, wanted, rng),
        self._images(*scenes),
      )
    ]
    if not self.branches:
      return [plain(samples[0])]
    if rng.random() < self.text:
      kinds = {'translate': 2, 'compare': 1}
      talk = self._ask(record, rng, 1, chat=True, kinds=kinds)
      samples.append(plain(chat(record.id, (), [talk])))
    return samples

  def _split(self, asked, wanted, rng) -> list[list[Question]]:
    """Cuts the questions into at most `wanted` conversations."""
    branches = []
    while asked and len(branches) < wanted:
      turns = rng.randint(1, self.turns)
      branches.append(asked[:turns])
      asked = asked[turns:]
    return branches


def chat(
  record: str,
  pictures: Sequence[TextSpan],
  conversations: Sequence[Sequence[Question]],
  images: Sequence[object] = (),
) -> Sample:
  """Makes a sample of several conversations about the same pictures.

  Each conversation is questions asked one after the other; `pictures` holds an
  image span for each of `images`, or words in its place.
  """
  prefix = chatml.turn_spans('system', chatml.DEFAULT_SYSTEM)
  prefix += chatml.open_turn('user')
  for number, span in enumerate(pictures, start=1):
    prefix += (TextSpan(f'Picture {number}: '), span, TextSpan('\n'))
  return Sample(
    record=record,
    prefix=prefix,
    continuations=tuple(map(_turns, conversations)),
    images=tuple(images),
  )


def _turns(turns: Sequence[Question]) -> tuple[TextSpan, ...]:
  """The turns, but for the beginning of the first, which the prefix holds."""
  spans = ()
  for number, asked in enumerate(turns):
    spans += chatml.open_turn('user') if number else ()
    spans += (TextSpan(asked.prompt), *chatml.CLOSE_TURN)
    spans += chatml.turn_spans('assistant', asked.answer)
  return spans
