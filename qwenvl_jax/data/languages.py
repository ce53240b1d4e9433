"""Which of the two languages of the data a text is in."""

import regex

_HAN = regex.compile(r'\p{Han}')
_LETTER = regex.compile(r'\p{L}')


def is_chinese(text: str) -> bool:
  """Returns whether half of its letters, or more, are Chinese characters."""
  chinese = len(_HAN.findall(text))
  return chinese > 0 and 2 * chinese >= len(_LETTER.findall(text))


def language_of(text: str) -> str:
  """Returns 'zh' or 'en', as records name the language of their text."""
  return 'zh' if is_chinese(text) else 'en'
