"""A page of training rows as the model gets them, for a person to look at.

Text and colours come from the row's arrays, not from the samples, so that what
the page shows is what is learned.
"""

import base64
import collections
import html
import io
import itertools
import json
import random

import numpy as np
from PIL import Image

from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data import pipeline, sources, tasks
from qwenvl_jax.data.bad import DROPPED, Counts
from qwenvl_jax.data.batches import NOTE
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text import drawing
from qwenvl_jax.text.tokenizer import Tokenizer

_STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em; max-width: 76em; }
section { display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em; }
.pictures { flex: none; width: 230px; }
.pictures img { width: 224px; image-rendering: pixelated; }
td, th { padding: 0 1em 0 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.text { font-family: monospace; white-space: pre-wrap; }
.branch { border-left: 3px solid #aac; padding-left: .7em; margin: .4em 0; }
.loss { background: #c9f2c9; }
.tag { color: #888; }
small { color: #666; }
"""

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
  """An HTML page of rows.

  Args:
    name: 'scenes' or 'easy_vqa'.
    data_dir: where the data is; None for the default folder.
    config: which set of scenes.
    split: which part.
    kind: 'questions', 'chats' or 'words'.
    rows: how many.
    seed: other rows for another seed.

  Raises:
    ConfigError: tasks that the data does not allow.
    DataError: data that is not prepared.
  """
  source, asked, vocabulary = _choose(name, data_dir, config, split, kind)
  stream = pipeline.Stream(source, asked)
  maker = pipeline.RowMaker(
    pipeline.Pipeline(
      streams=(stream,), sequence_length=_LENGTH, image_slots=2
    ),
    Tokenizer(vocabulary),
    source.open(),
    asked,
  )
  rng = random.Random(seed)
  sections = []
  for _ in range(rows):
    record = maker.source[rng.randrange(len(maker.source))]
    arrays = maker.row(record, rng).arrays
    sections.append(section(record.id, arrays, maker.tokenizer))
  return _page(f'{name}, {split}: {kind}', sections)


def stage_page(config: pipeline.Pipeline, title: str, rows: int = 20) -> str:
  """An HTML page of the first rows that a configured run trains on.

  Args:
    config: of the run.
    title: of the page.
    rows: how many.

  Raises:
    ConfigError: a configuration that cannot be run.
    DataError: data that is not prepared, or too many bad records.
  """
  tokenizer = Tokenizer(config.vocabulary)
  sections, counts = [], Counts()
  numbers = collections.defaultdict(lambda: np.zeros(6, np.int64))
  for index, row in enumerate(itertools.islice(config.rows(), rows)):
    note = json.loads(row.pop(NOTE, None) or '{}')
    group = note.get('group') or 'all'
    counts.add(note.get('counts', {}))
    config.limit.check(counts)
    sections.append(section(f'row {index}: {group}', row, tokenizer))
    numbers[group] += np.array(
      [
        1,
        row['segment_ids'].max(),
        np.count_nonzero(row['segment_ids']),
        np.count_nonzero(row['loss_weights']),
        np.count_nonzero(row['image_starts'] != NO_IMAGE),
        len(row['image_starts']),
      ]
    )
  summary = _utilization(numbers, config.sequence_length) + _dropped(counts)
  return _page(title, sections, summary)


def _page(title: str, sections: list[str], summary: str = '') -> str:
  title = html.escape(title)
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    f'<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{summary}'
    '<p>Green: learned. A bar on the left: a branch, '
    'which sees the trunk above it and itself. Boxes: those of the text. A '
    'line across: the next sample, which sees nothing of the one before.</p>'
    + ''.join(sections)
    + '</html>\n'
  )


def _utilization(numbers, length: int) -> str:
  """A table: how full the rows of each task are."""
  titles = (
    'task', 'rows', 'samples', 'tokens used', 'one sample a row would use',
    'tokens learned', 'image slots used',
  )  # fmt: skip
  lines = [''.join(f'<th>{x}</th>' for x in titles)]
  for name, found in [*sorted(numbers.items()), ('all', sum(numbers.values()))]:
    rows, samples, used, learned, images, slots = found.tolist()
    cells = (
      html.escape(name), rows, samples, f'{used / rows / length:.1%}',
      f'{used / samples / length:.1%}', f'{learned / rows / length:.1%}',
      f'{images} of {slots}',
    )  # fmt: skip
    lines.append(''.join(f'<td>{x}</td>' for x in cells))
  return f'<table>{"".join(f"<tr>{x}</tr>" for x in lines)}</table>'


def _dropped(counts: Counts) -> str:
  """A list: what was dropped on the way, and by which rule."""
  lines = [
    f'<li>{html.escape(source)}: {count} of {counts.seen_of(source)} records '
    f'dropped, {reason}: {html.escape(DROPPED[reason])}</li>'
    for source in counts.sources()
    for reason, count in counts.of(source).items()
  ]
  return f'<ul>{"".join(lines)}</ul>'


def _choose(name, data_dir, config, split, kind):
  if name == 'easy_vqa':
    if kind != 'questions':
      raise ConfigError(f'easy_vqa has questions only, not {kind}')
    return sources.EasyVqa(split), tasks.AskedTasks(), None
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
  """One row as HTML."""
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
  """Indices of each trunk and branch, in order."""
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
  encoded = io.BytesIO()
  drawn.save(encoded, 'PNG')
  data = base64.b64encode(encoded.getvalue()).decode()
  return f'<img alt="" src="data:image/png;base64,{data}">'
