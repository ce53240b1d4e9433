"""A page of training rows as the model gets them, for a person to look at.

Text and colours come from the row's arrays, not from the samples, so that what
the page shows is what is learned.
"""

import base64
import html
import io
import random

import numpy as np
from PIL import Image

from qwenvl_jax.batch import NO_IMAGE
from qwenvl_jax.data import pipeline, sources, tasks
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.text import drawing
from qwenvl_jax.text.tokenizer import Tokenizer

_STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2em; max-width: 76em; }
section { display: flex; gap: 1.5em; border-top: 1px solid #ccc; padding: 1em; }
.pictures { flex: none; width: 230px; }
.pictures img { width: 224px; image-rendering: pixelated; }
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
  title = f'{name}, {split}: {kind}'
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    f'<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>'
    '<p>Green: learned. A bar on the left: a branch, '
    'which sees the trunk above it and itself. Boxes: those of the text.</p>'
    + ''.join(sections)
    + '</html>\n'
  )


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
  text = tokenizer.decode(arrays['tokens'][:count])
  pictures = [
    _picture(arrays['pixels'][slot], text if slot == 0 else '')
    for slot, start in enumerate(arrays['image_starts'])
    if start != NO_IMAGE
  ]
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
