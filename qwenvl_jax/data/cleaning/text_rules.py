"""Rules about the text: what cleans it up, and what it is dropped for.

The paper names these rules and not their numbers: the defaults are ours.
"""

import dataclasses
import functools
import html
import unicodedata
from typing import ClassVar

import regex

from qwenvl_jax.data.cleaning.pair import Drop, Pair
from qwenvl_jax.data.languages import is_chinese
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text import special_tokens

_NAMES = """
a abbr acronym address applet area article aside audio b base big
blockquote body br button canvas caption center cite code col colgroup dd
del details dfn dir div dl dt em embed fieldset figcaption figure font
footer form frame frameset h1 h2 h3 h4 h5 h6 head header hr html i iframe
img input ins kbd label legend li link main map mark menu meta nav
noscript object ol optgroup option p param picture pre q s samp script
section select small source span strike strong style sub summary sup svg
table tbody td template textarea tfoot th thead time title tr tt u ul var
video wbr
"""
_ELEMENTS = frozenset(_NAMES.split())
# Between these, words do not belong together.
_INLINE_NAMES = 'a abbr b big em font i mark s small span strong u'
_INLINE = frozenset(_INLINE_NAMES.split())
_UNSEEN = regex.compile(
  r'<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>|\Z)',
  regex.DOTALL | regex.IGNORECASE,
)
_ELEMENT = regex.compile(r'</?([A-Za-z][A-Za-z0-9]*)(?:\s[^<>]*)?/?>')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Html:
  """Takes HTML out of texts: elements, comments, entities.

  Only names of HTML's own elements count, so that `<PERSON>` stays for
  `SpecialTags` to see.
  """

  name: ClassVar[str] = 'html'

  def __call__(self, pair: Pair) -> Pair:
    text = pair.text
    if '<' not in text and '&' not in text:
      return pair
    # Entities may hide elements, and entities.
    for _ in range(3):
      cleaned = _ELEMENT.sub(_element, _UNSEEN.sub(' ', html.unescape(text)))
      if cleaned == text:
        break
      text = cleaned
    return pair.with_text(' '.join(text.split()))


def _element(match) -> str:
  name = match[1].lower()
  if name not in _ELEMENTS:
    return match[0]
  return '' if name in _INLINE else ' '


# (what, pattern, replacement), in order. Each is linear in the length of a
# text: a run of signs is tried from its start only, and taken whole.
PATTERNS = (
  ('invisible', r'[\p{Cc}\p{Cf}--[\t\n\r]]', ''),
  ('address', r'(?:https?://|www\.)[^\s\p{Han}]+', ''),
  ('email', r'(?<![\w.+-])[\w.+-]++@[\w-]++(?:\.[\w-]++)+', ''),
  (
    'file',
    r'(?i)(?<!\S)(?=[\w()%-]*[\d_-])[\w()%-]++\.'
    r'(?:jpe?g|png|gif|webp|bmp|tiff?)\b',
    '',
  ),
  ('camera', r'\b(?:IMG|DSC|DSCN|DSCF|PXL)[_-]?\d{3,}\w*\b', ''),
  (
    'stock',
    r'(?i)(?<!\s)\s*+[-–|,]\s*+(?:royalty[- ]free\s+)?stock\s+'
    r'(?:photo|image|picture|vector|illustration|footage)s?\b.*$',
    '',
  ),
  ('empty', r'[(\[{（【]\s*[)\]}）】]', ''),
  ('repeated', r'([!?.,;:~*_=#+|/\\@^-])(?:\s*\1){2,}', r'\1'),
  ('repeated_wide', r'([！？。，；：、～…])\1+', r'\1'),
  ('edges', r'^[\s|.,;:*#~_=+>-]+|(?<![\s|,;:*#~_=<-])[\s|,;:*#~_=<-]++$', ''),
  ('space', r'\s+', ' '),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patterns:
  """Cleans irregular patterns: addresses, file names, repeated signs, ...

  Attributes:
    patterns: (what it finds, regular expression, replacement) each, applied in
      order; the syntax is that of the package `regex`, version 1.
  """

  name: ClassVar[str] = 'patterns'

  patterns: tuple[tuple[str, str, str], ...] = PATTERNS

  def __post_init__(self):
    for what, pattern, _ in self.patterns:
      try:
        _compiled(pattern)
      except regex.error as error:
        raise ConfigError(
          f'Patterns.patterns: {what!r} is no regular expression: {error}'
        ) from error

  def __call__(self, pair: Pair) -> Pair:
    text = pair.text
    for _, pattern, replacement in self.patterns:
      text = _compiled(pattern).sub(replacement, text)
    return pair.with_text(text.strip())


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str):
  return regex.compile(pattern, regex.VERSION1)


# Tags that stand for what was taken out of the texts: names of people in
# CC12M; words unknown to the annotators' vocabulary; user names.
SPECIAL_TAGS = ('<PERSON>', '<unk>', '<UNK>', '<user>', '<url>', '<hashtag>')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTags:
  """Drops texts with a data set's special tags (CC12M, SBU).

  Attributes:
    tags: any of these drops the text.
  """

  name: ClassVar[str] = 'special_tags'

  tags: tuple[str, ...] = SPECIAL_TAGS

  def __call__(self, pair: Pair) -> Pair | Drop:
    for tag in self.tags:
      if tag in pair.text:
        return Drop(tag)
    return pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTags:
  """Drops texts with the model's special tokens, which strangers may write.

  The tokenizer would take them for structure. Before `Html`, which knows `img`.
  """

  name: ClassVar[str] = 'model_tags'

  def __call__(self, pair: Pair) -> Pair | Drop:
    found = special_tokens.find(pair.text)
    return Drop(found) if found else pair


# Shown as a picture by default or on request (U+FE0F), flags, and keycaps.
_EMOJI = regex.compile(
  r'[\p{Emoji_Presentation}\p{Regional_Indicator}]'
  r'|\p{Extended_Pictographic}\uFE0F|[0-9#*]\uFE0F?\u20E3'
)
# Signs that could be shown as a picture and mostly are text: © ® ™ ‼ ⁉ arrows.
_SYMBOL = regex.compile(r'[\p{Extended_Pictographic}--[©®™‼⁉↔-↪]]', regex.V1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emoji:
  """Drops texts with emoji.

  Attributes:
    symbols: count hearts, stars and suns in text style too, but for © and the
      like.
  """

  name: ClassVar[str] = 'emoji'

  symbols: bool = True

  def __call__(self, pair: Pair) -> Pair | Drop:
    found = _EMOJI.search(pair.text)
    if found is None and self.symbols:
      found = _SYMBOL.search(pair.text)
    if found is None:
      return pair
    sign = found[0][0]
    return Drop(f'{found[0]} {unicodedata.name(sign, hex(ord(sign)))}')


_LETTER = regex.compile(r'\p{L}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
  """Drops texts in characters that are neither English nor Chinese.

  Attributes:
    scripts: Unicode names of the scripts that pass.
    tolerance: share of letters that may be of others.
  """

  name: ClassVar[str] = 'script'

  scripts: tuple[str, ...] = ('Latin', 'Han')
  tolerance: float = 0.0

  def __post_init__(self):
    try:
      _foreign(self.scripts)
    except regex.error as error:
      raise ConfigError(
        f'Script.scripts={self.scripts}: not all are names of scripts: {error}'
      ) from error

  def __call__(self, pair: Pair) -> Pair | Drop:
    foreign = _foreign(self.scripts).findall(pair.text)
    letters = len(_LETTER.findall(pair.text)) if foreign else 0
    if len(foreign) > self.tolerance * letters:
      return Drop(''.join(dict.fromkeys(foreign))[:40])
    return pair


@functools.lru_cache(maxsize=16)
def _foreign(scripts):
  inside = ''.join(rf'\p{{Script={script}}}' for script in scripts)
  # Modifier letters and the like are common to all scripts.
  return regex.compile(rf'[\p{{L}}--[{inside}\p{{Common}}]]', regex.V1)


# A Chinese character counts as a word: so are both languages' lengths alike.
_UNIT = regex.compile(r"\p{Han}|[\p{L}\p{N}--\p{Han}][\p{L}\p{N}\p{M}'’-]*+",
                      regex.V1)  # fmt: skip


def count_units(text: str) -> int:
  """Words, each Chinese character being one.

  >>> count_units("a dog's 2 bones"), count_units('两只狗 dog')
  (4, 4)
  """
  return len(_UNIT.findall(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
  """Drops texts that say too little, and those too long for one picture.

  Attributes:
    minimum, maximum: words, a Chinese character counting as one.
    characters: a text with more is too long, whatever its words.
  """

  name: ClassVar[str] = 'length'

  minimum: int = 3
  maximum: int = 128
  characters: int = 1000

  def __call__(self, pair: Pair) -> Pair | Drop:
    if len(pair.text) > self.characters:
      return Drop(f'{len(pair.text)} characters')
    units = count_units(pair.text)
    if not self.minimum <= units <= self.maximum:
      return Drop(f'{units} words')
    return pair


# Languages that are written in Latin letters and common on the web. Among all
# that the identifier knows, a short text's probability would be spread thin.
_LATIN = (
  'cs da de en es fi fr hr hu id it lt nl no pl pt ro sk sl sv sw tl tr vi'
)
LATIN_LANGUAGES = tuple(_LATIN.split())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
  """Drops texts of other languages written in Latin letters.

  Needs the package py3langid. Short texts and names carry little evidence, so
  that only a confident answer drops; `Script` has seen to other scripts before.

  Attributes:
    languages: codes (ISO 639-1) that pass.
    candidates: codes that are told apart.
    confidence: probability of another language from which on it drops.
    words: shorter texts pass.
  """

  name: ClassVar[str] = 'language'

  languages: tuple[str, ...] = ('en', 'zh')
  candidates: tuple[str, ...] = LATIN_LANGUAGES
  confidence: float = 0.9
  words: int = 4

  def __call__(self, pair: Pair) -> Pair | Drop:
    text = pair.text
    if is_chinese(text) or count_units(text) < self.words:
      return pair
      # Trained on running text: words in capitals say little to it.
    name, probability = _identifier(self.candidates).classify(text.lower())
    if name in self.languages or probability < self.confidence:
      return pair
    return Drop(f'{name}, probability {float(probability):.2f}')


@functools.lru_cache(maxsize=4)
def _identifier(candidates):
  try:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier
  except ImportError as error:
    raise ConfigError(
      'the rule Language needs py3langid: run '
      "`pip install 'qwenvl_jax[clean]'`, or leave the rule out"
    ) from error
  identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
  try:
    identifier.set_languages(candidates)
  except ValueError as error:
    raise ConfigError(f'Language.candidates: {error}') from error
  return identifier
