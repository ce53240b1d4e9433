"""Makes a data set of pages with text: any number, by any number of processes.

A page depends on the seed, its kind and its number only, and on the fonts of
the machine. Shards that are written are not written again.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator

from qwenvl_jax import buckets
from qwenvl_jax.data import sharded_job, storage
from qwenvl_jax.data.languages import language_of
from qwenvl_jax.data.making import (
  backgrounds,
  pages,
  pdf,
  typefaces,
  web,
  words,
)
from qwenvl_jax.data.making.page import Page, RefusedError
from qwenvl_jax.data.record_errors import Counts
from qwenvl_jax.data.records import Record, Word
from qwenvl_jax.data.sharded_job import Progress, ShardedJob
from qwenvl_jax.errors import ConfigError, DataError

KINDS = ('pages', 'pdf', 'html')
# What counts are of.
_PAGES = 'pages'

# Few, so that a thousand pages are work for several processes.
PER_SHARD = 128
# As many as their names can count.
_MOST_SHARDS = 99_999


@dataclasses.dataclass(frozen=True, kw_only=True)
class OcrSynthConfig:
  """What is made.

  Attributes:
    kind: 'pages' (SynthDoG), or those of documents: 'pdf' or 'html'.
    count: pages; of documents, the most that are tried.
    seed: other pages for another seed.
    chinese: share of pages in Chinese; not of documents.
    text: a UTF-8 file of text to write; None for words at random.
    fonts: folders with further fonts.
    documents: a folder of PDF or HTML files to take pages from.
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
  per_shard: int = PER_SHARD
  side: tuple[int, int] = (640, 1120)
  quality: int = 90

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ConfigError(f'{self.kind!r} is none of {", ".join(KINDS)}')
    for name in ('count', 'per_shard'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)}: give 1 or more')
    if self.count > _MOST_SHARDS * self.per_shard:
      raise ConfigError(
        f'{self.count:,} pages in more than {_MOST_SHARDS:,} shards: raise '
        '--per_shard'
      )
    if not 0 <= self.chinese <= 1:
      raise ConfigError(f'chinese={self.chinese} is no share from 0 to 1')
    if self.documents and self.kind == 'pages':
      raise ConfigError("kind 'pages' takes no documents; give pdf or html")
    if not self.documents and self.kind != 'pages':
      raise ConfigError(
        f'kind {self.kind!r} needs --documents, a folder of such files; '
        "composed pages are of kind 'pages'"
      )


# Bytes of an HTML file; what is behind them would not be on the first screen.
_MAX_HTML = 16 << 20
# A page is drawn anew if nothing fits it.
_TRIES = 100


class Maker:
  """Makes pages; to be closed after use."""

  def __init__(self, making: OcrSynthConfig):
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
    language = 'zh' if rng.random() < making.chinese else 'en'
    side = rng.randint(*making.side)
    if making.kind == 'pages':
      page = self._draw(rng, number, language)
    else:
      page = self._document(rng, number, side)
      language = language_of(''.join(line.word for line in page.lines))
    # As it can be read again: the picture is what it is after compression.
    return storage.serialize(
      Record(
        id=f'{making.kind}/{making.seed}/{number:08d}',
        images=(page.jpeg(making.quality),),
        size=page.picture.size,
        language=language,
        words=tuple(map(_rounded, page.lines)),
      )
    )

  def _draw(self, rng, number, language) -> Page:
    for _ in range(_TRIES):
      page = pages.draw(
        rng, self._style, self._words, self._faces, language,
        self._making.backgrounds,
      )  # fmt: skip
      if page.lines:  # Else it was too narrow for what was chosen.
        return page
    raise DataError(
      f'page {number}: nothing could be written on it in {_TRIES} tries; give '
      'other --text or more --fonts'
    )

  def _document(self, rng, number, side) -> Page:
    path, index = _chosen(self._making)[number]
    try:
      if self._making.kind == 'pdf':
        return pdf.read(path, index, side)
      with buckets.open_regular(pathlib.Path(path)) as file:
        markup = file.read(_MAX_HTML).decode('utf-8', 'replace')
    except (DataError, OSError) as error:
      raise RefusedError('unreadable_file') from error
    shorter = round(side * rng.uniform(0.6, 1.0))
    window = rng.choice(((side, shorter), (shorter, side)))
    page = self._browser.show(markup, window)
    if page is None:
      raise RefusedError('no_text')
    return page


def _rounded(line: Word) -> Word:
  return Word(
    line.word, tuple((round(x, 2), round(y, 2)) for x, y in line.quad)
  )


@functools.lru_cache(maxsize=4)
def _chosen(making: OcrSynthConfig) -> tuple[tuple[str, int], ...]:
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
  making: OcrSynthConfig,
  output: str | os.PathLike,
  workers: int = 1,
  progress: Progress = lambda done, total: None,
  again: bool = False,
  say: Callable[[str], None] = lambda line: None,
) -> Made:
  """Writes the data set, or goes on writing it.

  Args:
    making: what is made.
    output: the folder, DATA_DIR/NAME.
    workers: processes.
    progress: called with how many pages are done, and of how many.
    again: makes everything again, with other settings if need be.
    say: called with lines about what is made again.

  Raises:
    ConfigError: other settings than the folder was begun with, or something
      that is needed is not installed.
    DataError: a folder or file that cannot be read or written.
  """
  output = pathlib.Path(output).expanduser()
  folder = output / storage.VERSION
  _chosen.cache_clear()  # The files may be others since.
  total = len(_chosen(making)) if making.kind != 'pages' else making.count
  ranges = [
    range(first, min(first + making.per_shard, total))
    for first in range(0, total, making.per_shard)
  ]
  origins = tuple(_origin(making, numbers) for numbers in ranges)
  job = ShardedJob(folder, output.name, 'train', origins)
  with sharded_job.writing(output):
    sharded_job.check_settings(
      output / 'settings.txt', _settings(making), again
    )
    for line in job.begin(again):
      say(line)
    left = job.unfinished()
    if left:
      (folder / storage.INFO).unlink(missing_ok=True)
    # Alone, this process tells of every page.
    tell = (lambda page: progress(page + 1, total)) if workers == 1 else None
    sharded_job.run(
      {
        shard: functools.partial(
          _write_shard, making, job, shard, ranges[shard], tell
        )
        for shard in left
      },
      workers,
      (lambda done, count: None) if tell else progress,
    )
    lengths, counts = job.totals()
    refused = counts.of(_PAGES)
    if not sum(lengths):
      raise DataError(
        f'none of {total} pages of {making.documents} can be used: {refused}'
      )
    storage.write_info(
      folder,
      output.name,
      {'train': lengths},
      description=f'Pages with text and its places: {making.kind}.',
    )
  return Made(folder, tuple(lengths), refused)


def _settings(making: OcrSynthConfig) -> str:
  """All that decides what pages look like, but for documents."""
  fonts = (pathlib.Path(x.path).name for x in typefaces.find(making.fonts))
  lines = [repr(making), f'fonts: {" ".join(fonts)}']
  if making.text:
    lines.append(f'text: {sharded_job.origin_of(pathlib.Path(making.text))}')
  if making.backgrounds:
    found = backgrounds.pictures(making.backgrounds)
    files = _files(found)
    lines.append(f'backgrounds: {len(found)} files, {files}')
  return '\n'.join(lines) + '\n'


def _origin(making: OcrSynthConfig, numbers: range) -> str:
  pages = f'pages {numbers[0]} to {numbers[-1]}'
  if making.kind == 'pages':
    return pages
  chosen = _chosen(making)[numbers.start : numbers.stop]
  files = dict.fromkeys(file for file, _ in chosen)
  return f'{pages} of {_files(files)}'


def _files(paths: Iterable[str]) -> str:
  found = map(sharded_job.origin_of, map(pathlib.Path, paths))
  return f'files {sharded_job.digest(found)}'


def _write_shard(
  making: OcrSynthConfig,
  job: ShardedJob,
  shard: int,
  numbers: range,
  tell: Callable[[int], None] | None,
) -> None:
  """Writes a shard, and what was refused."""
  counts = Counts()

  def records(maker: Maker) -> Iterator[bytes]:
    for number in numbers:
      counts.seen(_PAGES)
      try:
        yield maker.record(number)
      except RefusedError as error:
        counts.dropped(_PAGES, str(error))
      if tell:
        tell(number)

  with contextlib.closing(Maker(making)) as maker:
    length = storage.write_records(job.path(shard), records(maker))
  job.finish(shard, {'length': length, 'counts': counts})
