"""Synthetic records with the lengths of the data sets that they stand for.

Record n is a function of n: no file, no memory, whatever their number.
"""

import dataclasses
import functools
import io
import random

import numpy as np
from PIL import Image

from qwenvl_jax.data.records import (
  GroundedCaption,
  Qa,
  Record,
  Region,
  Span,
  Turn,
  Word,
)

_WORDS = [
  'the',
  'a',
  'of',
  'in',
  'on',
  'with',
  'and',
  'red',
  'blue',
  'old',
  'small',
  'large',
  'man',
  'woman',
  'dog',
  'street',
  'house',
  'water',
  'tree',
  'car',
  'table',
  'window',
  'white',
  'black',
  'view',
  'photo',
  'vintage',
  'modern',
  'wooden',
  'summer',
  'city',
  'people',
  'sitting',
  'standing',
  'playing',
  'looking',
  'made',
  'from',
  'design',
  'home',
  'kitchen',
  'garden',
  'beautiful',
  'flower',
  'mountain',
  'beach',
  'sunset',
  'portrait',
  'background',
]
_CHINESE = '的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出'

# Per data set: mean words of a caption (characters where Chinese). Means follow
# what their authors or others have published, rounded; lengths are log-normal.
_CAPTION = {
  'laion_en': 13, 'laion_zh': 22, 'laion_coco': 11, 'datacomp': 12, 'coyo': 15,
  'cc12m': 20, 'cc3m': 10, 'sbu': 15, 'coco_captions': 14,
}  # fmt: skip
# Questions a picture, words of a question, words of an answer.
_QA = {
  'gqa': (13, 9, 1), 'vgqa': (14, 6, 2), 'vqav2': (5, 6, 1),
  'dvqa': (11, 12, 1),
  'ocrvqa': (5, 6, 3), 'docvqa': (4, 9, 3), 'textvqa': (2, 7, 2),
  'chartqa': (1, 12, 1), 'ai2d': (3, 10, 2),
}  # fmt: skip
# Phrases a picture, words of a phrase.
_REGIONS = {
  'grit': (2, 5), 'visual_genome': (50, 5), 'refcoco': (7, 4),
  'refcoco_plus': (7, 4), 'refcocog': (4, 8),
}  # fmt: skip
# Words with quads a picture.
_OCR = {'synthdog_en': 25, 'synthdog_zh': 25, 'pdf': 35, 'html': 35}
_TEXT = {'text_en': 350, 'text_zh': 450}


@dataclasses.dataclass(frozen=True)
class Synthetic:
  """A source of synthetic records.

  Attributes:
    name: the data set that it stands for.
    size: how many records.
    pictures: what their images are, used in turn.
  """

  name: str
  size: int = 10_000_000
  pictures: tuple[bytes, ...] = ()

  def open(self) -> 'Synthetic':
    return self

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> Record:
    rng = random.Random(index)
    language = 'zh' if self.name.endswith('_zh') else 'en'
    words = functools.partial(_words, rng, language)
    record = Record(f'{self.name}/{index}', language=language)
    if self.name in _TEXT:
      return dataclasses.replace(record, text=words(_TEXT[self.name]))
    pictures = self.pictures or _tiny()
    image = (pictures[index % len(pictures)],)
    record = dataclasses.replace(record, images=image, size=(1000, 1000))
    if self.name in _CAPTION:
      return dataclasses.replace(record, captions=(words(_CAPTION[self.name]),))
    if self.name in _QA:
      count, question, answer = _QA[self.name]
      asked = (
        Qa(f'{words(question)}?', words(answer))
        for _ in range(_some(rng, count))
      )
      return dataclasses.replace(record, questions=tuple(asked))
    if self.name in _OCR:
      count = _some(rng, _OCR[self.name])
      found = (Word(words(1), _quad(rng)) for _ in range(count))
      return dataclasses.replace(record, words=tuple(found))
    if self.name in _REGIONS:
      return self._placed(record, rng, words)
    return dataclasses.replace(
      record, turns=(Turn('user', '<img>0</img>'), Turn('assistant', words(40)))
    )

  def _placed(self, record, rng, words) -> Record:
    count, phrase = _REGIONS[self.name]
    regions = tuple(
      Region(words(phrase), (_box(rng),)) for _ in range(_some(rng, count))
    )
    text, spans = '', []
    for region in regions[:4]:
      text += words(4) + ' '
      spans.append(
        Span(len(text), len(text) + len(region.phrase), region.boxes)
      )
      text += region.phrase + ' '
    grounded = GroundedCaption(text, tuple(spans))
    return dataclasses.replace(record, regions=regions, grounded=(grounded,))


def _some(rng, mean: float) -> int:
  """Log-normal with this mean, at least 1."""
  return max(1, round(rng.lognormvariate(0, 0.45) * mean / 1.107))


def _words(rng, language: str, mean: float) -> str:
  count = _some(rng, mean)
  if language == 'zh':
    return ''.join(rng.choices(_CHINESE, k=count))
  return ' '.join(rng.choices(_WORDS, k=count))


def _box(rng) -> tuple:
  x, y = rng.uniform(0, 800), rng.uniform(0, 800)
  return x, y, rng.uniform(x + 10, 1000), rng.uniform(y + 10, 1000)


def _quad(rng) -> tuple:
  x, y = rng.uniform(100, 800), rng.uniform(100, 900)
  return (x, y), (x + 90, y + 2), (x + 89, y + 40), (x - 1, y + 38)


@functools.cache
def _tiny() -> tuple[bytes, ...]:
  encoded = io.BytesIO()
  Image.new('RGB', (16, 16), 'teal').save(encoded, 'PNG')
  return (encoded.getvalue(),)


@functools.cache
def photographs(count: int = 64) -> tuple[bytes, ...]:
  """JPEG files of the sizes and detail of photographs on the web.

  Octaves of noise, so that their spectrum falls as that of photographs; sides
  and quality as img2dataset and COCO leave them, about 100 KB each.
  """
  rng = np.random.default_rng(0)
  sides = ((640, 480), (480, 640), (640, 427), (512, 384), (600, 600))
  made = []
  for number in range(count):
    width, height = sides[number % len(sides)]
    total = np.zeros((height, width, 3))
    for octave in range(1, 8):
      noise = rng.normal(0, 1, (2**octave, 2**octave, 3))
      planes = [
        Image.fromarray(noise[..., c].astype(np.float32)).resize(
          (width, height), Image.Resampling.BICUBIC
        )
        for c in range(3)
      ]
      total += np.stack([np.asarray(x) for x in planes], -1) * 0.62**octave
    total = (total - total.min()) / np.ptp(total) * 255
    encoded = io.BytesIO()
    Image.fromarray(total.astype(np.uint8)).save(encoded, 'JPEG', quality=90)
    made.append(encoded.getvalue())
  return tuple(made)
