"""What scenes are made of: things, colours and words, named in two languages.

Names were chosen so that a thing is one token of the Qwen vocabulary wherever
the templates use it (` apple`, ` apples`, `苹果`), whatever stands next to it;
`tests/data/test_things.py` holds this. Class ids index `THINGS`, colour ids
`COLOURS`.
"""

import dataclasses

LANGUAGES = ('en', 'zh')


@dataclasses.dataclass(frozen=True)
class Thing:
  """A class of objects.

  Attributes:
    en: singular, as in 'an apple'.
    plural: as in 'two apples'.
    zh: as in '两个苹果'.
    measure: the measure word, '个' in '两个苹果'.
    emoji: what the sprite sheet is cut from.
  """

  en: str
  plural: str
  zh: str
  measure: str
  emoji: str

  def name(self, language: str) -> str:
    return self.en if language == 'en' else self.zh


# The order is part of the data: append only. The first 16 are the default.
THINGS = (
  Thing('apple', 'apples', '苹果', '个', '🍎'),
  Thing('cat', 'cats', '猫', '只', '🐱'),
  Thing('dog', 'dogs', '狗', '只', '🐶'),
  Thing('car', 'cars', '汽车', '辆', '🚗'),
  Thing('house', 'houses', '房子', '座', '🏠'),
  Thing('fish', 'fish', '鱼', '条', '🐟'),
  Thing('bird', 'birds', '鸟', '只', '🐦'),
  Thing('flower', 'flowers', '花', '朵', '🌻'),
  Thing('key', 'keys', '钥匙', '把', '🔑'),
  Thing('star', 'stars', '星星', '颗', '⭐'),
  Thing('hat', 'hats', '帽子', '顶', '🎩'),
  Thing('frog', 'frogs', '青蛙', '只', '🐸'),
  Thing('rabbit', 'rabbits', '兔子', '只', '🐰'),
  Thing('camera', 'cameras', '相机', '台', '📷'),
  Thing('panda', 'pandas', '熊猫', '只', '🐼'),
  Thing('clock', 'clocks', '钟', '个', '🕒'),
  Thing('bear', 'bears', '熊', '只', '🐻'),
  Thing('elephant', 'elephants', '大象', '头', '🐘'),
  Thing('butterfly', 'butterflies', '蝴蝶', '只', '🦋'),
  Thing('bus', 'buses', '巴士', '辆', '🚌'),
  Thing('plane', 'planes', '飞机', '架', '🛩'),
  Thing('mushroom', 'mushrooms', '蘑菇', '个', '🍄'),
  Thing('bike', 'bikes', '自行车', '辆', '🚲'),
  Thing('gift', 'gifts', '礼物', '件', '🎁'),
)


@dataclasses.dataclass(frozen=True)
class Colour:
  """A background colour: its names and the HSV range it is drawn from.

  Attributes:
    hue: centre of the hue in degrees.
    saturation, value: (low, high) in 0..1. Shades of one background vary
      within the range, so that no shade could be called by another name.
  """

  en: str
  zh: str
  hue: float
  saturation: tuple[float, float]
  value: tuple[float, float]

  def name(self, language: str) -> str:
    return self.en if language == 'en' else self.zh


# The order is part of the data: append only.
COLOURS = (
  Colour('red', '红色', 0, (0.75, 0.95), (0.65, 0.9)),
  Colour('yellow', '黄色', 54, (0.6, 0.9), (0.85, 1.0)),
  Colour('green', '绿色', 125, (0.55, 0.9), (0.45, 0.8)),
  Colour('blue', '蓝色', 218, (0.6, 0.95), (0.6, 0.95)),
  Colour('purple', '紫色', 280, (0.5, 0.8), (0.45, 0.75)),
  Colour('pink', '粉色', 338, (0.2, 0.4), (0.93, 1.0)),
  Colour('brown', '棕色', 25, (0.6, 0.8), (0.3, 0.5)),
  Colour('gray', '灰色', 0, (0.0, 0.02), (0.35, 0.7)),
)

# Words painted on scenes for OCR, each one token after '<ref>'.
WORDS_EN = (
  'open', 'stop', 'time', 'home', 'test', 'game', 'data', 'news',
  'info', 'food', 'road', 'park', 'music', 'water', 'start', 'north',
)  # fmt: skip
WORDS_ZH = (
  '中国', '北京', '上海', '公司', '大学', '时间', '生活', '世界',
  '音乐', '电影', '医院', '银行', '城市', '天气', '老师', '安全',
)  # fmt: skip
WORDS = tuple((word, 'en') for word in WORDS_EN) + tuple(
  (word, 'zh') for word in WORDS_ZH
)

# Patterns of a background's two shades. The order is part of the data.
TEXTURES = ('plain', 'gradient', 'stripes', 'checks', 'noise')


def held_out(thing: int, colour: int) -> bool:
  """Whether a class never stands on this colour outside the 'combos' split."""
  return (3 * thing + 5) % len(COLOURS) == colour
