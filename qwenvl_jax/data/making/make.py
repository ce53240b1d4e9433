"""Makes a data set of pages with text: any number, by any number of processes.

A page depends on the seed, its kind and its number only, and on the fonts of
the machine. Shards that are written are not written again.
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import random
from collections import Counter
from collections.abc import Callable, Iterator

from qwenvl_jax.data import shard_files, storage
from qwenvl_jax.data.making import pages, pdf, typefaces, web, words
from qwenvl_jax.data.making.page import Page, count_chinese
from qwenvl_jax.data.records import Record, Word
from qwenvl_jax.errors import ConfigError, DataError

KINDS = ('pages', 'pdf', 'html')

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Making:
  """What is made.

  Attributes:
    kind: 'pages' (SynthDoG), 'pdf' or 'html'.
    count: pages; of a person's documents, the most that are tried.
    seed: other pages for another seed.
    chinese: share of pages in Chinese; not of a person's documents.
    text: a UTF-8 file of text to write; None for words at random.
    fonts: folders with further fonts.
    documents: a folder of PDF or HTML files to take pages from; None to compose
      them.
    backgrounds: a folder of photographs to lay pages on; None to compose them.
    chromium: the browser's program; None to look for it.
    per_shard: pages in a shard.
    side: smallest and largest longer side of a picture, in pixels.
    quality: of the JPEG pictures.
  """

  kind: str
  count: int
  seed: int = 0
  chinese: float = 0.5
  text: str | None = None
  fonts: tuple[str, ...] = ()
  documents: str | None = None
  backgrounds: str | None = None
  chromium: str | None = None
  per_shard: int = 512
  side: tuple[int, int] = (640, 1120)
  quality: int = 90

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ConfigError(f'{self.kind!r} is none of {", ".join(KINDS)}')
    for name in ('count', 'per_shard'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)}: give 1 or more')
    if not 0 <= self.chinese <= 1:
      raise ConfigError(f'chinese={self.chinese} is no share from 0 to 1')
    if self.documents and self.kind == 'pages':
      raise ConfigError("kind 'pages' takes no documents; give pdf or html")


class RefusedError(Exception):
  """A document's page that cannot be used; the text is the reason."""


class Maker:
  """Makes pages; one in every process. Close it after use."""

  def __init__(self, making: Making):
    self._making = making
    self._faces = typefaces.find(making.fonts)
    self._words = words.from_vocabulary()
    if making.text:
      self._words = words.from_file(making.text)
    self._browser = None
    if making.kind == 'html':
      self._browser = web.Browser(making.chromium)
    self._style = pages.Style(side=making.side)

  def close(self) -> None:
    if self._browser is not None:
      self._browser.close()

  def record(self, number: int) -> bytes:
    """The serialized record of page `number`.

    Raises:
      RefusedError: the document's page cannot be used.
    """
    making = self._making
    rng = random.Random(f'{making.kind}-{making.seed}-{number}')
    page, language = self._page(rng, number)
    if language is None:
      text = ''.join(line.text for line in page.lines)
      language = 'zh' if 2 * count_chinese(text) > len(text) else 'en'
    # As it can be read again: the picture is what it is after compression.
    return storage.serialize(
      Record(
        id=f'{making.kind}/{making.seed}/{number:08d}',
        images=(page.jpeg(making.quality),),
        size=page.picture.size,
        language=language,
        words=tuple(
          Word(
            line.text,
            tuple((round(x, 2), round(y, 2)) for x, y in line.quad),
          )
          for line in page.lines
        ),
      )
    )

  def _page(self, rng, number) -> tuple[Page, str | None]:
    making = self._making
    language = 'zh' if rng.random() < making.chinese else 'en'
    side = rng.randint(*making.side)
    written = self._words, self._faces, language
    if making.kind == 'pages':
      page = pages.draw(rng, self._style, *written, making.backgrounds)
      if not page.lines:  # Too narrow for what was chosen: another try.
        return self._page(rng, number)
      return page, language
    if making.documents:
      return self._document(rng, number, side), None
    if making.kind == 'pdf':
      return pdf.read(pdf.compose(rng, *written), 0, side), language
    page = self._browser.show(web.compose(rng, *written), _window(rng, side))
    if page is None:
      raise RefusedError('no_text')
    return page, language

  def _document(self, rng, number, side) -> Page:
    path, index = _chosen(self._making)[number]
    try:
      if self._making.kind == 'pdf':
        return pdf.read(path, index, side)
      document = web.read_file(pathlib.Path(path))
    except pdf.RefusedError as error:
      raise RefusedError(str(error)) from error
    except (DataError, OSError) as error:
      raise RefusedError('unreadable_file') from error
    page = self._browser.show(document, _window(rng, side))
    if page is None:
      raise RefusedError('no_text')
    return page


def _window(rng, side) -> tuple[int, int]:
  shorter = round(side * rng.uniform(0.6, 1.0))
  return rng.choice(((side, shorter), (shorter, side)))


@functools.lru_cache(maxsize=4)
def _chosen(making: Making) -> tuple[tuple[str, int], ...]:
  """(file, page) of every page that is tried, in an order of the seed's.

  Raises:
    DataError: the folder holds no such file.
  """
  suffixes = ('.pdf',) if making.kind == 'pdf' else ('.html', '.htm')
  root = pathlib.Path(making.documents).expanduser()
  files = sorted(
    str(path)
    for path in root.rglob('*')
    if path.suffix.lower() in suffixes and path.is_file()
  )
  if not files:
    raise DataError(f'{root} holds no {" or ".join(suffixes)} file')
  rng = random.Random(f'documents-{making.seed}')
  rng.shuffle(files)
  chosen = []
  for file in files:
    count = 1
    if making.kind == 'pdf':
      try:
        count = pdf.pages_in(file)
      except DataError:
        count = 1  # Tried, refused and counted.
    chosen += [(file, index) for index in range(count)]
    if len(chosen) >= making.count:
      break
  return tuple(chosen[: making.count])


@dataclasses.dataclass(frozen=True)
class Made:
  """What was made.

  Attributes:
    folder: of the shards.
    lengths: pages in each.
    refused: pages that could not be used, by reason.
  """

  folder: pathlib.Path
  lengths: tuple[int, ...]
  refused: dict[str, int]


def make(
  making: Making,
  output: str | os.PathLike,
  workers: int = 1,
  progress: Progress = lambda done, total: None,
) -> Made:
  """Writes the data set, or goes on writing it.

  Args:
    making: what is made.
    output: the folder, DATA_DIR/NAME.
    workers: processes.
    progress: called with how many pages were tried, and of how many.

  Raises:
    ConfigError: other settings than the folder was begun with, or something
      that is needed is not installed.
    DataError: a folder or file that cannot be read or written.
  """
  output = pathlib.Path(output).expanduser()
  folder = output / storage.VERSION
  total = len(_chosen(making)) if making.documents else making.count
  count = -(-total // making.per_shard)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _begin(making, output)
    with _Crew(making, workers) as crew:
      states = []
      for shard in range(count):
        first = shard * making.per_shard
        numbers = range(first, min(first + making.per_shard, total))
        path = folder / storage.shard_name(output.name, 'train', shard, count)
        states.append(_shard(crew, numbers, path, progress, total))
    lengths = tuple(length for length, _ in states)
    refused = sum((refused for _, refused in states), Counter())
    if not sum(lengths):
      raise DataError(
        f'none of {total} pages of {making.documents} can be used: '
        f'{dict(refused)}'
      )
    if not (folder / storage.INFO).exists():
      storage.write_info(
        folder,
        output.name,
        {'train': list(lengths)},
        description=f'Pages with text and its places: {making.kind}.',
      )
    shard_files.remove_partial(folder)
  except OSError as error:
    raise DataError(
      f'cannot write to {output} ({error}); free some space or name another '
      'folder: finished shards stay'
    ) from error
  return Made(folder, lengths, dict(refused))


def _begin(making, output):
  """Writes or compares the settings, fonts included."""
  names = [pathlib.Path(x.path).name for x in typefaces.find(making.fonts)]
  now = f'{making!r}\n{" ".join(names)}\n'
  settings = output / 'settings.txt'
  if not settings.exists():
    shard_files.write_text(settings, now)
    return
  before = settings.read_text(encoding='utf-8')
  if before != now:
    what = 'fonts' if before.split('\n')[0] == repr(making) else 'settings'
    raise ConfigError(
      f'{output} was begun with other {what} (its settings.txt says which); '
      'name another folder, or delete this one'
    )


def _shard(crew, numbers, path, progress, total) -> tuple[int, Counter]:
  """Writes a shard unless it is there: its length and what was refused."""
  done = path.with_name(f'{path.name}.refused')
  if path.exists() and done.exists():
    refused = Counter(done.read_text().split())
    progress(numbers[-1] + 1, total)
    return len(numbers) - sum(refused.values()), refused
  refused = Counter()

  def records() -> Iterator[bytes]:
    for number, (record, reason) in zip(numbers, crew.make(numbers)):
      if record is None:
        refused[reason] += 1
      else:
        yield record
      progress(number + 1, total)

  length = shard_files.write_records(path, records())
  shard_files.write_text(done, ' '.join(refused.elements()))
  return length, refused


class _Crew:
  """Processes that make pages in order; or this one."""

  def __init__(self, making, workers):
    self._making = making
    self._workers = workers
    self._pool = None
    self._maker = None

  def __enter__(self):
    if self._workers > 1:
      self._pool = concurrent.futures.ProcessPoolExecutor(
        self._workers,
        multiprocessing.get_context('spawn'),
        _start,
        (self._making,),
      )
    return self

  def __exit__(self, *error):
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
    if self._maker is not None:
      self._maker.close()

  def make(self, numbers):
    """(record, '') or (None, reason) for each number."""
    if self._pool is None:
      if self._maker is None:
        self._maker = Maker(self._making)
      return (_made(self._maker, number) for number in numbers)
    return self._pool.map(_made_here, numbers, chunksize=4)


def _made(maker, number) -> tuple[bytes | None, str]:
  try:
    return maker.record(number), ''
  except RefusedError as error:
    return None, str(error)


_MAKER = []  # Of this worker process.


def _start(making):
  _MAKER.append(Maker(making))


def _made_here(number):
  return _made(_MAKER[0], number)
