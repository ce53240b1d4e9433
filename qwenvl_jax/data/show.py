"""A page of training rows as the model gets them, for a person to look at.

Text and colours come from the row's arrays, not from the samples, so that what
the page shows is what is learned.
"""

import collections
import html
import itertools
from collections.abc import Mapping

import numpy as np
from PIL import Image

from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data import formats, html_page, pipeline, sources, tasks
from qwenvl_jax.data.record_errors import DROPPED, Counts
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text import drawing
from qwenvl_jax.text.tokenizer import Tokenizer

_STYLE = """
section { display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em; }
.pictures { flex: none; width: 230px; }
.pictures img { width: 224px; image-rendering: pixelated; }
.text { font-family: monospace; white-space: pre-wrap; }
.branch { border-left: 3px solid #aac; padding-left: .7em; margin: .4em 0; }
.loss { background: #c9f2c9; }
"""

_HOW_TO_READ = (
  '<p>Green: learned. A bar on the left: a continuation, which sees the prefix '
  'above it and itself. Boxes: those of the text. A line across: the next '
  'sample, which sees nothing of the one before.</p>'
)

# Row lengths that hold all branches of the default tasks.
_LENGTH = 512


def page(
  name: str,
  data_dir: str | None = None,
  config: str = 'default',
  split: str = 'train',
  kind: str = 'questions',
  rows: int = 12,
  seed: int = 0,
) -> str:
  """An HTML page of rows of 'scenes' or 'easy_vqa'.

  Raises:
    ConfigError: tasks that the data does not allow.
    DataError: data that is not prepared.
  """
  source, asked, vocabulary = _choose(name, data_dir, config, split, kind)
  made = pipeline.Pipeline(
    streams=(pipeline.Stream(source, asked),),
    vocabulary=vocabulary,
    sequence_length=_LENGTH,
    image_slots=2,
    seed=seed,
    prefetch=0,
  )
  return stage_page(made, f'{name}, {split}: {kind}', rows)


def stage_page(config: pipeline.Pipeline, title: str, rows: int = 20) -> str:
  """An HTML page of the first rows that a configured run trains on.

  Raises:
    ConfigError: a configuration that cannot be run.
    DataError: data that is not prepared, or too many bad records.
  """
  tokenizer = Tokenizer(config.vocabulary)
  sections, counts, dropped = [], Counts(), {}
  used = collections.defaultdict(int)
  for index, (arrays, stats) in enumerate(
    itertools.islice(config.rows(), rows)
  ):
    group = stats.group or 'all'
    counts.update(stats.counts)
    dropped = stats.dropped | dropped
    config.limit.check(counts)
    name = f'row {index}: {group}, {", ".join(stats.records)}'
    sections.append(section(name, arrays, tokenizer))
    used[group] += _use(arrays)
  summary = _utilization(used) + _dropped(counts, dropped)
  body = summary + _HOW_TO_READ + ''.join(sections)
  return html_page.page(title, body, _STYLE)


def _use(arrays: dict[str, np.ndarray]) -> np.ndarray:
  """How full a row is; such counts add up."""
  segments, starts = arrays['segment_ids'], arrays['image_starts']
  return np.array([
    1, segments.max(), len(segments), np.count_nonzero(segments),
    np.count_nonzero(arrays['loss_weights']),
    len(starts), np.count_nonzero(starts != NO_IMAGE),
  ])  # fmt: skip


def _utilization(used: Mapping[str, np.ndarray]) -> str:
  """Returns a table: how full the rows of each task are."""
  titles = (
    'task', 'rows', 'samples', 'tokens used', 'one sample a row would use',
    'tokens learned', 'image slots used',
  )  # fmt: skip
  lines = []
  for name, sums in [*sorted(used.items()), ('all', sum(used.values()))]:
    rows, samples, length, tokens, learned, slots, images = sums
    lines.append([
      html.escape(name), rows, samples, f'{tokens / length:.1%}',
      f'{tokens / samples / length * rows:.1%}', f'{learned / length:.1%}',
      f'{images} of {slots}',
    ])  # fmt: skip
  return html_page.table(titles, lines)


def _dropped(counts: Counts, examples: Mapping) -> str:
  """Returns a list: what was dropped, by which rule, and an example of each."""
  lines = [
    f'<li>{html.escape(source)}: {count} of {counts.seen_of(source)} records '
    f'dropped, {reason}: {html.escape(DROPPED[reason])}; e.g. '
    f'{html.escape(examples.get((source, reason), ""))}</li>'
    for source in counts.sources()
    for reason, count in counts.of(source).items()
  ]
  return f'<ul>{"".join(lines)}</ul>'


def _choose(name, data_dir, config, split, kind):
  if name == 'easy_vqa':
    if kind != 'questions':
      raise ConfigError(f'easy_vqa has questions only, not {kind}')
    return sources.EasyVqa(split), formats.Answers(branches=6), None
  asked = {
    'questions': tasks.Questions(),
    'chats': tasks.Chats(branches=3),
    'words': tasks.Questions(in_words=True),
  }[kind]
  source = sources.Scenes(data_dir, split, config)
  return source, asked, sources.small_vocabulary(data_dir)


def section(
  record: str, arrays: dict[str, np.ndarray], tokenizer: Tokenizer
) -> str:
  """Returns a row as HTML.

  Args:
    record: what to call the row.
    arrays: of one row of `Batch`, by name.
    tokenizer: that made it.
  """
  used = arrays['segment_ids'] > 0
  count = int(used.sum())
  pictures, drawn = [], set()
  for slot, start in enumerate(arrays['image_starts']):
    if start == NO_IMAGE:
      continue
    # The boxes of a sample are drawn on its first picture.
    segment, text = arrays['segment_ids'][start], ''
    if segment not in drawn:
      drawn.add(segment)
      of_sample = arrays['segment_ids'] == segment
      text = tokenizer.decode(arrays['tokens'][of_sample])
    pictures.append(_picture(arrays['pixels'][slot], text))
  learned = int((arrays['loss_weights'] > 0).sum())
  return (
    f'<section><div class="pictures">{"".join(pictures)}<br><small>'
    f'{html.escape(record)}<br>{count} of {len(used)} tokens, {learned} '
    f'learned</small></div><div class="text">{_text(arrays, tokenizer)}</div>'
    '</section>'
  )


def _text(arrays, tokenizer) -> str:
  parts, previous = [], (0, 0)
  # The weight of a token stands at the position that predicts it.
  weights = np.concatenate([[0], arrays['loss_weights'][:-1]])
  for (segment, branch), indices in _runs(arrays):
    if segment != previous[0]:
      parts.append('<hr>' if previous[0] else '')
    parts.append('<div class="branch">' if branch else '<div>')
    parts.append(_spans(arrays['tokens'][indices], weights[indices], tokenizer))
    parts.append('</div>')
    previous = (segment, branch)
  return ''.join(parts)


def _runs(arrays):
  """Yields the indices of each prefix and continuation, in order."""
  keys = np.stack([arrays['segment_ids'], arrays['branch_ids']], axis=1)
  edges = np.flatnonzero(np.any(np.diff(keys, axis=0), axis=1)) + 1
  for indices in np.split(np.arange(len(keys)), edges):
    segment, branch = keys[indices[0]].tolist()
    if segment:
      yield (segment, branch), indices


def _spans(tokens, weights, tokenizer) -> str:
  """Text of a run, runs of equal weight in one span."""
  edges = np.flatnonzero(np.diff(weights)) + 1
  parts = []
  for indices in np.split(np.arange(len(tokens)), edges):
    text = html.escape(tokenizer.decode(tokens[indices]))
    text = text.replace('\n', '↵\n')
    if weights[indices[0]]:
      text = f'<span class="loss">{text}</span>'
    parts.append(text)
  return ''.join(parts)


def _picture(pixels: np.ndarray, text: str) -> str:
  drawn, _ = drawing.draw(Image.fromarray(pixels), text)
  return html_page.picture(drawn)
