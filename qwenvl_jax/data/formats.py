"""The paper's seven tasks, conversations and documents, made from records.

Each class is a function `(record, rng, another) -> [Sample, ..]` with settings,
as in `tasks`; an empty list if the record does not allow it. Prompts carry no
loss, answers do (paper, Appendix B):

  caption               <img>..</img>Generate the caption in English: CAPTION
  vqa                   <img>..</img>QUESTION Answer: ANSWER
  grounding             <img>..</img>Generate the caption in English with
                        grounding: .. <ref>PHRASE</ref><box>..</box> ..
  referring             <img>..</img><ref>PHRASE</ref><box>..</box>
  grounded captioning   <img>..</img><ref>This</ref><box>..</box> is PHRASE
  ocr                   <img>..</img>OCR with grounding: <ref>WORD</ref>
                        <quad>..</quad>..
  text                  TEXT
  interleaved           TEXT<img>..</img>TEXT<img>..</img>TEXT

each ended by `<|endoftext|>`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from random import Random

from qwenvl_jax.data import wording
from qwenvl_jax.data.examples import END, Sample
from qwenvl_jax.data.records import Record, Region, Span
from qwenvl_jax.text import chatml, grounding
from qwenvl_jax.text.chatml import TextSpan

# What gives a further record, which nothing here needs.
Another = Callable[[], Record]

_IMAGE = TextSpan('<img>0</img>')

# Between a prompt and its answer. Chinese has no space there.
_SPACE = {'en': ' ', 'zh': ''}
_ANSWER = {'en': '{} Answer:', 'zh': '{}回答：'}
_IS = {'en': ' is ', 'zh': '是'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
  """The longest caption of a picture, or one at random.

  Attributes:
    longest: of several captions take the longest, as the paper does.
  """

  longest: bool = True

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    if not record.captions:
      return []
    caption = max(record.captions, key=len)
    if not self.longest:
      caption = rng.choice(record.captions)
    prompt = wording.PLAIN[record.language]['caption']
    answer = _SPACE[record.language] + caption
    return [_about_picture(record, [_asked(prompt, answer)], 0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Branching:
  """Several questions about one picture.

  Attributes:
    branches: at most so many, each as if it stood alone (`Batch.branch_ids`);
      0 for one question, without branches.
  """

  branches: int = 0

  def _some(self, record, asked: Sequence, rng) -> list[Sample]:
    """Samples of some of `asked`, which are pieces of a prompt and answer."""
    if not asked or not record.images:
      return []
    count = min(len(asked), max(self.branches, 1))
    return [_about_picture(record, rng.sample(asked, count), self.branches)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers(_Branching):
  """Questions with their answers."""

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    language = record.language
    asked = [vqa(language, x.question, x.answer) for x in record.questions]
    return self._some(record, asked, rng)


def vqa(language: str, question: str, answer: str) -> tuple[TextSpan, ...]:
  """Returns the spans of a question and of its answer."""
  return _asked(_ANSWER[language].format(question), _SPACE[language] + answer)


@dataclasses.dataclass(frozen=True)
class GroundedCaptions:
  """A caption with boxes after its phrases; see `without_nesting`."""

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    found = [x for x in record.grounded if x.spans]
    if not found:
      return []
    chosen = rng.choice(found)
    parts, at = [_SPACE[record.language]], 0
    for span in without_nesting(chosen.spans):
      if not 0 <= span.start < span.end <= len(chosen.text):
        continue
      parts.append(chosen.text[at : span.start])
      parts.append(_ref(chosen.text[span.start : span.end]))
      parts.append(_boxes(record, span.boxes))
      at = span.end
    parts.append(chosen.text[at:])
    prompt = wording.PLAIN[record.language]['grounded_caption']
    return [_about_picture(record, [_asked(prompt, ''.join(parts))], 0)]


def without_nesting(spans: Sequence[Span]) -> list[Span]:
  """The most phrases of a caption of which none contains or overlaps another.

  Greedy: the phrase that ends first is kept, and the next that begins after it.

  >>> [x.end for x in without_nesting([Span(0, 9, ()), Span(0, 2, ()),
  ...                                  Span(4, 9, ())])]
  [2, 9]
  """
  kept, free = [], 0
  for span in sorted(spans, key=lambda x: (x.end, -x.start)):
    if span.start >= free:
      kept.append(span)
      free = span.end
  return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Referring(_Branching):
  """Where is what a phrase says?"""

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    asked = [
      _asked(_ref(x.phrase), _boxes(record, x.boxes)) for x in record.regions
    ]
    return self._some(record, asked, rng)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroundedCaptioning(_Branching):
  """What is in this box?"""

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    asked = [self._ask(record, x) for x in record.regions]
    return self._some(record, asked, rng)

  def _ask(self, record: Record, region: Region):
    language = record.language
    boxes = _boxes(record, region.boxes)
    prompt = wording.PLAIN[language]['name_box'].format(boxes)
    return _asked(prompt, _IS[language] + region.phrase)


@dataclasses.dataclass(frozen=True)
class Ocr:
  """All words of a picture with their corners."""

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    if not record.words or not record.images:
      return []
    words = []
    for word in record.words:
      flat = [value for point in word.quad for value in point]
      quad = grounding.from_pixels(flat, record.size)
      words.append(_ref(word.word) + grounding.format_quad(quad))
    prompt = wording.PLAIN[record.language]['ocr']
    answer = _SPACE[record.language] + ''.join(words)
    return [_about_picture(record, [_asked(prompt, answer)], 0)]


@dataclasses.dataclass(frozen=True)
class Text:
  """A document without a picture; all of it is learned."""

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    if not record.text:
      return []
    return [Sample(record.id, (_learned(record.text + END),))]


@dataclasses.dataclass(frozen=True)
class Conversations:
  """ChatML conversations about any number of pictures, as they were written.

  Attributes:
    system: what the system turn says, where the record has none of its own.
  """

  system: str = chatml.DEFAULT_SYSTEM

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    turns = [(turn.role, turn.text) for turn in record.turns]
    spans = chatml.conversation_spans(turns, self.system)
    return [Sample(record.id, spans, images=record.images)] if spans else []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interleaved:
  """Documents of texts and pictures in order; the texts are learned.

  Of a longer document another part is taken each time, and what does not fit
  into a row is cut off before a picture.

  Attributes:
    images: pictures of a sample at most.
  """

  images: int = 7

  def __call__(self, record: Record, rng: Random, *_: Another) -> list[Sample]:
    count = len(record.images)
    if not record.texts or not count:
      return []
    first = rng.randrange(max(count - self.images, 0) + 1)
    last = min(first + self.images, count)
    spans = []
    for number in range(first, last):
      spans += [_learned(record.texts[number]), _IMAGE]
    spans.append(_learned(record.texts[last] + (END if last == count else '')))
    spans = tuple(x for x in spans if x.text)
    images = record.images[first:last]
    return [Sample(record.id, spans, images=images, divisible=True)]


def _learned(text: str) -> TextSpan:
  return TextSpan(text, loss=True)


def _asked(prompt: str, answer: str) -> tuple[TextSpan, TextSpan]:
  return TextSpan(prompt), _learned(answer + END)


def _about_picture(record: Record, asked, branches: int) -> Sample:
  images = record.images[:1]
  if not branches:
    return Sample(record.id, (_IMAGE, *asked[0]), images=images)
  return Sample(record.id, (_IMAGE,), tuple(asked), images)


def _ref(phrase: str) -> str:
  return f'<ref>{phrase}</ref>'


def _boxes(record: Record, boxes) -> str:
  return ''.join(
    grounding.format_box(grounding.from_pixels(x, record.size)) for x in boxes
  )
