"""`qwenvl-data make-ocr`: pages with text, to learn reading."""

import functools
from collections.abc import Sequence

import rich.console

from qwenvl_jax import entry
from qwenvl_jax.data.making import make
from qwenvl_jax.progress import bars

DESCRIPTION = """
Makes pages with text in English and Chinese, and knows where every line is.

Kinds: 'pages' are sheets of paper on natural backgrounds, turned, in
perspective, with noise (in the manner of SynthDoG); 'pdf' and 'html' are pages
of your own files (--documents), as pdfium and headless Chromium show them.
Fonts are those of this machine, of matplotlib and of --fonts: the more there
are, the better (Debian: fonts-noto-cjk, fonts-arphic-ukai, ..).

Writes array_record shards as `qwenvl-data prepare` does: a data set called NAME
in DATA_DIR. The same seed and fonts give the same pages. Started again, it goes
on where it stopped.
"""

EXAMPLES = """
qwenvl-data make-ocr --kind pages --n 10000 --workers 8 data/ocr_pages
qwenvl-data make-ocr --kind pages --n 10000 --text wikipedia.txt \\
  --backgrounds photographs data/ocr_pages
qwenvl-data make-ocr --kind pdf --n 5000 --documents papers data/ocr_pdf
qwenvl-data make-ocr --kind html --n 5000 --documents site data/ocr_html
"""


# Fields of `make.OcrSynthConfig`.
_OPTIONS = {
  'seed': ('N', 'other pages for another seed'),
  'chinese': ('SHARE', 'share of pages in Chinese'),
  'text': ('FILE', 'UTF-8 text to write, a sentence a line (default: words of '
   'the vocabulary at random)'),
  'documents': ('DIR', 'the PDF or HTML files to take pages from'),
  'backgrounds': ('DIR', 'photographs to lay pages on (default: composed)'),
  'chromium': ('PROGRAM', 'the browser for html (default: $CHROMIUM, or where '
   'it usually is)'),
  'per_shard': ('N', 'pages in a shard'),
}  # fmt: skip


def command(argv: Sequence[str], console: rich.console.Console) -> None:
  """Runs the command; raises QwenVLError on bad input."""
  parser = entry.parser(
    'qwenvl-data make-ocr', DESCRIPTION, EXAMPLES, gin_help=False
  )
  parser.add_argument('output', metavar='DATA_DIR/NAME', help='where to')
  parser.add_argument('--kind', choices=make.KINDS, default='pages')
  parser.add_argument(
    '--n', dest='count', type=int, default=1000,
    help='pages (default: %(default)s)',
  )  # fmt: skip
  entry.add_fields(parser, make.OcrSynthConfig, _OPTIONS)
  parser.add_argument(
    '--fonts', action='append', default=[], metavar='DIR',
    help='a folder of further fonts; may be repeated',
  )  # fmt: skip
  parser.add_argument(
    '--workers', type=int, default=1, help='processes (default: %(default)s)'
  )
  parser.add_argument(
    '--again', action='store_true', help='make all shards again'
  )
  flags, _ = entry.parse(parser, argv)
  flags.fonts = tuple(flags.fonts)
  making = entry.from_flags(make.OcrSynthConfig, flags)
  with bars(console) as progress:
    made = make.make(
      making,
      flags.output,
      flags.workers,
      functools.partial(progress, f'making {flags.kind}'),
      flags.again,
      functools.partial(console.print, soft_wrap=True, markup=False),
    )
  console.print(
    f'{made.folder}: {sum(made.lengths):,} pages in {len(made.lengths)} shards'
  )
  for reason, count in sorted(made.refused.items()):
    console.print(f'refused {count:,} pages: {reason}')
