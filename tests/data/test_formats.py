import json
import pathlib
import random

import numpy as np
import pytest

from qwenvl_jax.data import formats
from qwenvl_jax.data.examples import encode_sample
from qwenvl_jax.data.records import (
  GroundedCaption,
  Qa,
  Record,
  Region,
  Span,
  Turn,
  Word,
)
from qwenvl_jax.text.tokenizer import Tokenizer, image_paths

_TOKENIZER = Tokenizer()
_GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens' / 'tokenizer.json'
_PICTURE = ('encoded',)


def _made(task, record, seed=0):
  return task(record, random.Random(seed), None)


def _marked(task, record, seed=0):
  """The text with its loss spans in [[ ]]."""
  (sample,) = _made(task, record, seed)
  pieces = [
    *sample.prefix,
    *(p for branch in sample.continuations for p in branch),
  ]
  return ''.join(f'[[{p.text}]]' if p.loss else p.text for p in pieces)


def _spans(text, **phrases):
  """Spans of phrases, found in the text."""
  return tuple(
    Span(text.index(p), text.index(p) + len(p), tuple(boxes))
    for p, boxes in ((k.replace('_', ' '), v) for k, v in phrases.items())
  )


_BEES = 'Beautiful shot of bees gathering nectars from an apricot flower'

# Coordinates are thousandths already where the picture is 1000 x 1000.
RECORD = Record(
  'r',
  _PICTURE,
  (1000, 1000),
  captions=('short', 'the beautiful flowers for design.', 'longer'),
  questions=(Qa('Does the bandage have a different color?', 'No'),),
  regions=(Region('the ear on a giraffe', ((176, 106, 232, 160),)),),
  grounded=(
    GroundedCaption(
      _BEES,
      _spans(
        _BEES,
        bees=[(661, 612, 833, 812), (120, 555, 265, 770)],
        an_apricot_flower=[(224, 13, 399, 313)],
      ),
    ),
  ),
  words=(
    Word('It is managed', ((568, 121), (625, 131), (624, 182), (567, 172))),
    Word('by', ((1, 2), (3, 2), (3, 4), (1, 4))),
  ),
  text='A document.',
)


@pytest.mark.parametrize(
  ('task', 'text'),
  [
    (
      formats.Captions(),
      '<img>0</img>Generate the caption in English:'
      '[[ the beautiful flowers for design.<|endoftext|>]]',
    ),
    (
      formats.Answers(),
      '<img>0</img>Does the bandage have a different color? Answer:'
      '[[ No<|endoftext|>]]',
    ),
    (
      formats.GroundedCaptions(),
      '<img>0</img>Generate the caption in English with grounding:'
      '[[ Beautiful shot of <ref>bees</ref><box>(661,612),(833,812)</box>'
      '<box>(120,555),(265,770)</box> gathering nectars from '
      '<ref>an apricot flower</ref><box>(224,13),(399,313)</box>'
      '<|endoftext|>]]',
    ),
    (
      formats.Referring(),
      '<img>0</img><ref>the ear on a giraffe</ref>'
      '[[<box>(176,106),(232,160)</box><|endoftext|>]]',
    ),
    (
      formats.GroundedCaptioning(),
      '<img>0</img><ref>This</ref><box>(176,106),(232,160)</box>'
      '[[ is the ear on a giraffe<|endoftext|>]]',
    ),
    (
      formats.Ocr(),
      '<img>0</img>OCR with grounding:[[ <ref>It is managed</ref>'
      '<quad>(568,121),(625,131),(624,182),(567,172)</quad>'
      '<ref>by</ref><quad>(1,2),(3,2),(3,4),(1,4)</quad><|endoftext|>]]',
    ),
    (formats.Text(), '[[A document.<|endoftext|>]]'),
  ],
)
def test_the_papers_formats(task, text):
  assert _marked(task, RECORD) == text
  # As tokens, the loss begins where the text does: the ids of the whole text
  # are those of its pieces.
  (sample,) = _made(task, RECORD)
  encoded = encode_sample(sample, _TOKENIZER, 4)
  plain = text.replace('[[', '').replace(']]', '')
  assert encoded.tokens.tolist() == _TOKENIZER.encode(plain, 4)
  learned = _TOKENIZER.decode(encoded.tokens[encoded.weights > 0])
  assert learned == text[text.index('[[') + 2 : -2]


def test_chinese():
  record = Record(
    'r', _PICTURE, (10, 10), 'zh', captions=('红花',),
    questions=(Qa('什么颜色？', '红色'),),
    regions=(Region('花', ((0, 0, 5, 5),)),),
  )  # fmt: skip
  assert _marked(formats.Captions(), record) == (
    '<img>0</img>用中文描述图片：[[红花<|endoftext|>]]'
  )
  assert _marked(formats.Answers(), record) == (
    '<img>0</img>什么颜色？回答：[[红色<|endoftext|>]]'
  )
  assert _marked(formats.GroundedCaptioning(), record) == (
    '<img>0</img><ref>这</ref><box>(0,0),(500,500)</box>[[是花<|endoftext|>]]'
  )


def test_several_questions_share_a_picture():
  regions = tuple(Region(f'p{i}', ((i, i, 9, 9),)) for i in range(6))
  record = Record('r', _PICTURE, (10, 10), regions=regions)
  (sample,) = _made(formats.Referring(branches=4), record)
  assert len(sample.continuations) == len(set(sample.continuations)) == 4
  (other,) = _made(formats.Referring(branches=4), record, seed=1)
  assert other.continuations != sample.continuations
  (alone,) = _made(formats.Referring(), record)
  assert not alone.continuations and len(alone.prefix) == 3


def test_nested_phrases_keep_the_most():
  caption = 'a bee on an apricot flower in a garden'
  whole = Span(0, len(caption), ((0, 0, 9, 9),))
  spans = (whole, *_spans(caption, a_bee=[], an_apricot_flower_in_a_garden=[]))
  spans += _spans(caption, flower=[], an_apricot_flower=[], a_garden=[])
  kept = formats.without_nesting(spans)
  assert [caption[x.start : x.end] for x in kept] == [
    'a bee', 'flower', 'a garden',
  ]  # fmt: skip
  assert formats.without_nesting([whole]) == [whole]
  # No choice of spans without overlap is larger.
  rng = random.Random(0)
  for _ in range(50):
    edges = [sorted(rng.sample(range(12), 2)) for _ in range(6)]
    some = [Span(a, b, ()) for a, b in edges]
    best = 0
    for mask in range(64):
      chosen = [x for i, x in enumerate(some) if mask >> i & 1]
      chosen.sort(key=lambda x: x.start)
      if all(a.end <= b.start for a, b in zip(chosen, chosen[1:])):
        best = max(best, len(chosen))
    assert len(formats.without_nesting(some)) == best


def test_spans_beyond_the_caption_are_left_out():
  spans = (Span(0, 3, ((0, 0, 5, 5),)), Span(2, 99, ((0, 0, 5, 5),)))
  record = Record('r', _PICTURE, (10, 10), grounded=(
    GroundedCaption('cat', spans), GroundedCaption('none', ()),
  ))  # fmt: skip
  assert '[[ <ref>cat</ref><box>(0,0),(500,500)</box><|endoftext|>]]' in (
    _marked(formats.GroundedCaptions(), record)
  )


@pytest.mark.parametrize(
  'task',
  [
    formats.Captions(), formats.Answers(), formats.GroundedCaptions(),
    formats.Referring(), formats.GroundedCaptioning(), formats.Ocr(),
    formats.Text(), formats.Conversations(),
  ],
)  # fmt: skip
def test_nothing_to_ask(task):
  assert _made(task, Record('r', _PICTURE, (9, 9))) == []


@pytest.mark.parametrize('number', range(3))
def test_conversations_as_the_release_labels_them(number):
  golden = json.loads(_GOLDEN.read_text(encoding='utf-8'))['sft'][number]
  turns = [Turn(x['from'], x['value']) for x in golden['conversations']]
  paths = [path for x in turns for path in image_paths(x.text)]
  record = Record('r', tuple(paths), turns=tuple(turns))
  (sample,) = _made(formats.Conversations(), record)
  encoded = encode_sample(sample, _TOKENIZER, 256)
  size = len(encoded)
  assert encoded.tokens.tolist() == golden['input_ids'][:size]
  assert set(golden['input_ids'][size:]) <= {_TOKENIZER.eod_id}
  labels = np.where(encoded.weights > 0, encoded.tokens, -100)
  assert labels.tolist() == golden['labels'][:size]
  assert set(golden['labels'][size:]) <= {-100}
  assert len(encoded.image_starts) == len(paths)


def test_documents_of_texts_and_pictures():
  record = Record('r', ('a', 'b', 'c'), texts=('One.', 'Two.', '', 'Three.'))
  assert _marked(formats.Interleaved(), record) == (
    '[[One.]]<img>0</img>[[Two.]]<img>0</img><img>0</img>'
    '[[Three.<|endoftext|>]]'
  )
  # Parts of a longer one, wherever they begin.
  parts = {
    (_marked(formats.Interleaved(images=2), record, seed), images)
    for seed in range(20)
    for images in [_made(formats.Interleaved(images=2), record, seed)[0].images]
  }
  assert parts == {
    ('[[One.]]<img>0</img>[[Two.]]<img>0</img>', ('a', 'b')),
    ('[[Two.]]<img>0</img><img>0</img>[[Three.<|endoftext|>]]', ('b', 'c')),
  }
  (sample,) = _made(formats.Interleaved(), record)
  assert sample.divisible
  assert _made(formats.Interleaved(), Record('r', ('a',), text='x')) == []
