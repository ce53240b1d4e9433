"""The special tokens of the vocabulary, and finding them in people's text.

Text that is encoded as structure must not hold them by accident: written by a
stranger, they would end documents, open images, or change who speaks.
"""

import re

# The tokens of images and boxes: the only special ones in chat content.
VISUAL_TOKENS = (
  '<ref>',
  '</ref>',
  '<box>',
  '</box>',
  '<quad>',
  '</quad>',
  '<img>',
  '</img>',
  '<imgpad>',
)
# Of them, what is read as more than characters in anybody's text.
PLACE_TOKENS = tuple(token for token in VISUAL_TOKENS if 'img' not in token)
# In the order of their ids, which follow the ranks of the vocabulary.
SPECIAL_TOKENS = (
  '<|endoftext|>',
  '<|im_start|>',
  '<|im_end|>',
  *(f'<|extra_{i}|>' for i in range(205)),
  *VISUAL_TOKENS,
)
# What no text spells out, not even one that marks images and boxes.
CONTROL_TOKENS = tuple(
  token for token in SPECIAL_TOKENS if token not in VISUAL_TOKENS[:-1]
)

_KNOWN = frozenset(SPECIAL_TOKENS)
_LONGEST = max(map(len, SPECIAL_TOKENS))
_SPECIAL = re.compile('|'.join(map(re.escape, SPECIAL_TOKENS)))
_CONTROL = re.compile('|'.join(map(re.escape, CONTROL_TOKENS)))
_PARTS = re.compile('[<>]|[^<>]+')


def find(text: str) -> str:
  """Returns the first special token that a text spells out, or ''."""
  found = _SPECIAL.search(text)
  return found[0] if found else ''


def find_control(text: str) -> str:
  """Returns the first of `CONTROL_TOKENS` that a text spells out, or ''."""
  found = _CONTROL.search(text)
  return found[0] if found else ''


def remove(text: str) -> str:
  """Returns the text without special tokens; linear in its length.

  Removing one may join the parts of another, which is removed as well.

  >>> remove('a <<img>img> b <c>')
  'a  b <c>'
  """
  if not _SPECIAL.search(text):
    return text
  kept = []
  for part in _PARTS.findall(text):
    kept.append(part)
    if part == '>':
      _remove_last(kept)
  return ''.join(kept)


def _remove_last(parts: list[str]) -> None:
  """Removes a special token from the end of a list of parts, if there is one.

  A token begins with its only '<' and ends with its only '>', so that it takes
  up whole parts, and no more characters than the longest.
  """
  size = 0
  for start in range(len(parts) - 1, -1, -1):
    size += len(parts[start])
    if size > _LONGEST:
      return
    if parts[start] == '<':
      if ''.join(parts[start:]) in _KNOWN:
        del parts[start:]
      return
