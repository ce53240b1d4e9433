"""The fonts of this machine that can write English or Chinese."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence

from PIL import ImageFont

from qwenvl_jax.errors import DataError
from qwenvl_jax.text import fonts

FOLDERS = (
  '/usr/share/fonts',
  '/usr/local/share/fonts',
  '~/.local/share/fonts',
  '~/.fonts',
  '/System/Library/Fonts',
  '/Library/Fonts',
  '~/Library/Fonts',
  'C:/Windows/Fonts',
)
_SUFFIXES = ('.ttf', '.ttc', '.otf')
# Too thin to be read when small; and TeX's fonts, whose letters are elsewhere.
_UNFIT = re.compile(r'Hairline|Thin|ExtraLight|^cm\w*10\.')
_LATIN = frozenset(range(0x21, 0x7F))
# Every Chinese font has these, old or new forms alike.
_COMMON_CHINESE = frozenset(
  map(ord, '的一是不了人我在有他中大上小山水月木，。')
)


@dataclasses.dataclass(frozen=True)
class Typeface:
  """A font file.

  Attributes:
    path: of the file.
    characters: code points that it holds.
    languages: which of 'en' and 'zh' it can write.
  """

  path: str
  characters: frozenset[int] = dataclasses.field(repr=False)
  languages: tuple[str, ...]

  def font(self, size: int) -> ImageFont.FreeTypeFont:
    return fonts.open_font(self.path, size)


@functools.lru_cache(maxsize=4)
def find(folders: Sequence[str | os.PathLike] = ()) -> tuple[Typeface, ...]:
  """All fonts of the system, of matplotlib, of this package and of `folders`.

  Ordered by file name, each name once: what is drawn depends on which fonts
  there are.

  Raises:
    DataError: one of `folders` holds no font.
  """
  paths = {}
  for folder in folders:
    found = _files(folder)
    if not found:
      raise DataError(f'{folder} holds no .ttf, .ttc or .otf file')
    paths.update(found)
  spec = importlib.util.find_spec('matplotlib')
  shipped = [pathlib.Path(spec.origin).parent / 'mpl-data/fonts/ttf']
  for folder in (*FOLDERS, *shipped):
    paths = {**_files(folder), **paths}
  paths[fonts.PACKAGED_FONT.name] = str(fonts.PACKAGED_FONT)
  made = (_typeface(paths[name]) for name in sorted(paths))
  return tuple(face for face in made if face is not None)


def _files(folder) -> dict[str, str]:
  """File name -> path of the fonts below a folder."""
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    return {}
  return {
    path.name: str(path)
    for path in sorted(root.rglob('*'))
    if path.suffix.lower() in _SUFFIXES and not _UNFIT.search(path.name)
  }


def _typeface(path: str) -> Typeface | None:
  held = fonts.characters(path)
  languages = []
  if held >= _LATIN and _draws(path, 'Ag'):
    languages.append('en')
  if held >= _COMMON_CHINESE and _draws(path, '中文'):
    languages.append('zh')
  return Typeface(path, held, tuple(languages)) if languages else None


def _draws(path, text) -> bool:
  """Whether the font opens and draws different shapes for the characters."""
  font = fonts.open_font(path, 24)
  if font is None:
    return False
  try:
    first, second = (bytes(font.getmask(c)) for c in text)
  except (OSError, ValueError):
    return False
  return any(first) and any(second) and first != second


def of_language(
  faces: Sequence[Typeface], language: str
) -> tuple[Typeface, ...]:
  """Those that write a language; never empty, as one comes with the package."""
  return tuple(face for face in faces if language in face.languages)
