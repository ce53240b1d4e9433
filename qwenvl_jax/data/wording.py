"""How questions and answers are worded, in English and Chinese.

One wording for the formats of stages 1 and 2, one for chats. Everything a
prompt or an answer says about a scene is built from the phrases here, so that
training, evaluation and the vocabulary agree.
"""

import functools
import random

from qwenvl_jax.data import things
from qwenvl_jax.data.records import Scene
from qwenvl_jax.text import grounding

_EN_NUMBERS = ('no', 'a', 'two', 'three', 'four', 'five', 'six')
_ZH_NUMBERS = ('零', '一', '两', '三', '四', '五', '六')
# By whether something is there, is so, and is on the right.
YES = {'en': ('no', 'yes'), 'zh': ('没有', '有')}
TRUE = {'en': ('no', 'yes'), 'zh': ('不是', '是')}
SIDE = {'en': ('left', 'right'), 'zh': ('左边', '右边')}


def some(thing: int, count: int, language: str) -> str:
  """Class and number: 'an apple', 'two apples', '一个苹果', '两个苹果'."""
  entry = things.THINGS[thing]
  if language == 'zh':
    return f'{_ZH_NUMBERS[count]}{entry.measure}{entry.zh}'
  if count == 1:
    return f'{_article(entry.en)} {entry.en}'
  return f'{_EN_NUMBERS[count]} {entry.plural}'


def the(thing: int, count: int, language: str) -> str:
  """A known class: 'the apple', 'the two apples', '苹果', '两个苹果'."""
  entry = things.THINGS[thing]
  if language == 'zh':
    return entry.zh if count == 1 else some(thing, count, language)
  if count == 1:
    return f'the {entry.en}'
  return f'the {_EN_NUMBERS[count]} {entry.plural}'


def _article(word: str) -> str:
  return 'an' if word[0] in 'aeiou' else 'a'


def join(phrases: list[str], language: str) -> str:
  """'a, b and c' or 'a、b和c'."""
  if len(phrases) == 1:
    return phrases[0]
  comma, last = (', ', ' and ') if language == 'en' else ('、', '和')
  return comma.join(phrases[:-1]) + last + phrases[-1]


def caption(scene: Scene, language: str, boxes: bool = False) -> str:
  """Everything in the scene: classes as `things.THINGS` has them, the colour.

  'a cat and two apples on a red background' or '一只猫和两个苹果，红色背景';
  each phrase followed by its boxes on request.
  """
  phrases = []
  for thing in scene.classes:
    members = scene.of(thing)
    phrase = some(thing, len(members), language)
    if boxes:
      phrase = f'<ref>{phrase}</ref>{box_text(scene, members)}'
    phrases.append(phrase)
  colour = scene.colour_name(language)
  if language == 'zh':
    return f'{join(phrases, language)}，{colour}背景'
  return f'{join(phrases, language)} on {_article(colour)} {colour} background'


def inventory(
  scene: Scene, language: str, rng: random.Random, places: bool = True
) -> str:
  """What a picture shows, for a reader without eyes: one line.

  Things in any order, words, the colour: '<ref>the cat</ref><box>..</box>red';
  or, without places and each thing in both languages, 'the cat猫,red'.
  """
  objects = list(scene.objects)
  rng.shuffle(objects)
  names = [the(x.thing, 1, language) for x in objects]
  colour = scene.colour_name(language)
  if not places:
    other = 'zh' if language == 'en' else 'en'
    names = [
      name + the(x.thing, 1, other)
      for name, x in zip(names, objects, strict=True)
    ]
    return (',' if language == 'en' else '，').join([*names, colour]) + '\n'
  parts = [
    f'<ref>{name}</ref>{box_text(scene, [x])}'
    for name, x in zip(names, objects, strict=True)
  ]
  parts += [quad_text(scene, word) for word in scene.words]
  return ''.join([*parts, colour]) + '\n'


def many(thing: int, language: str) -> str:
  """What a count asks for: 'apples', '个苹果'."""
  entry = things.THINGS[thing]
  return entry.plural if language == 'en' else entry.measure + entry.zh


def bare(thing: int, language: str) -> str:
  """What an existence question asks for: 'an apple', '苹果'."""
  return some(thing, 1, 'en') if language == 'en' else the(thing, 1, 'zh')


# Several questions of a row are about the same box.
@functools.lru_cache(maxsize=1 << 12)
def thousandths(side: int, points: tuple[float, ...]) -> tuple[int, ...]:
  """Pixels x, y, x, y, .. of a square as the integers that text holds."""
  return grounding.from_pixels(points, (side, side))


def box_text(scene: Scene, objects) -> str:
  """Returns the boxes of objects as the model writes them, in thousandths."""
  return ''.join(
    grounding.format_box(thousandths(scene.side, x.box)) for x in objects
  )


def quad_text(scene: Scene, word) -> str:
  """'<ref>open</ref><quad>..</quad>'."""
  flat = tuple(value for point in word.quad for value in point)
  quad = grounding.format_quad(thousandths(scene.side, flat))
  return f'<ref>{word.word}</ref>{quad}'


# Prompts by kind. A chat asks the same in another form.
PLAIN = {
  'en': {
    'caption': 'Generate the caption in English:',
    'grounded_caption': 'Generate the caption in English with grounding:',
    'exist': 'Is there {} in the picture? Answer:',
    'count': 'How many {} are there? Answer:',
    'count_all': 'How many things are there? Answer:',
    'count_both': 'How many {} and {} are there in total? Answer:',
    'colour': 'What color is the background? Answer:',
    'left_of': 'Is {} to the left of {}? Answer:',
    'side': 'Is {} on the left or the right? Answer:',
    'refer': '<ref>{}</ref>',
    'name_box': '<ref>This</ref>{}',
    'ocr': 'OCR with grounding:',
    'read': 'OCR:',
    'translate': 'Translate into Chinese: {}\n',
    'compare': '{} is to the left of {}. Is {} to the left of {}? Answer:',
  },
  'zh': {
    'caption': '用中文描述图片：',
    'grounded_caption': '用中文描述图片并标出位置：',
    'exist': '图中有{}吗？回答：',
    'count': '图中有几{}？回答：',
    'count_all': '图中有几个物体？回答：',
    'count_both': '{}和{}一共有几个？回答：',
    'colour': '背景是什么颜色？回答：',
    'left_of': '{}在{}的左边吗？回答：',
    'side': '{}在左边还是右边？回答：',
    'refer': '<ref>{}</ref>',
    'name_box': '<ref>这</ref>{}',
    'ocr': '识别文字并标出位置：',
    'read': '识别文字：',
    'translate': '翻译成英文：{}\n',
    'compare': '{}在{}的左边。{}在{}的左边吗？回答：',
  },
}

CHAT = {
  'en': {
    'caption': 'Describe the picture in English.',
    'grounded_caption': 'Describe the picture with boxes.',
    'exist': 'Is there {}?',
    'count': 'How many {} are there?',
    'count_all': 'How many things are there?',
    'count_both': 'How many {} and {} are there in total?',
    'colour': 'What color is the background?',
    'left_of': 'Is {} to the left of {}?',
    'side': 'Is {} on the left or the right?',
    'refer': 'Find {}.',
    'name_box': 'What is in {}?',
    'ocr': 'Read the text and show where it is.',
    'read': 'Read the text.',
    'translate': 'Translate into Chinese: {}',
    'compare': '{} is to the left of {}. Is {} to the left of {}?',
    'which': 'Which picture has {}?',
    'nth_caption': 'Describe picture {}.',
    'nth_count': 'How many {} are in picture {}?',
    'nth_colour': 'What color is the background of picture {}?',
  },
  'zh': {
    'caption': '用中文描述图片。',
    'grounded_caption': '描述图片并框出物体。',
    'exist': '图中有{}吗？',
    'count': '图中有几{}？',
    'count_all': '图中有几个物体？',
    'count_both': '{}和{}一共有几个？',
    'colour': '背景是什么颜色？',
    'left_of': '{}在{}的左边吗？',
    'side': '{}在左边还是右边？',
    'refer': '框出{}。',
    'name_box': '{}里是什么？',
    'ocr': '读出文字并标出位置。',
    'read': '读出文字。',
    'translate': '翻译成英文：{}',
    'compare': '{}在{}的左边。{}在{}的左边吗？',
    'which': '哪张图里有{}？',
    'nth_caption': '描述第{}张图片。',
    'nth_count': '第{}张图里有几{}？',
    'nth_colour': '第{}张图的背景是什么颜色？',
  },
}
