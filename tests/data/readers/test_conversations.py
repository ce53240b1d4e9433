"""Conversations as people have them become turns in the release's form."""

import json
import os

import downloads
import pytest

from qwenvl_jax.data import shards
from qwenvl_jax.data.readers.conversations import Conversations, conversation
from qwenvl_jax.data.record_errors import ErrorBudget
from qwenvl_jax.data.records import Turn
from qwenvl_jax.data.sanitize import sanitize
from qwenvl_jax.errors import BadRecordError, DataError

_SHOWN = 'Picture 1: <img>a.png</img>\n'
_ASKED = [Turn('user', _SHOWN + 'What is this?'), Turn('assistant', 'A cat.')]


def _talk(*said, names=('from', 'value'), roles=('user', 'assistant')):
  return [
    dict(zip(names, (roles[n % 2], text), strict=True))
    for n, text in enumerate(said)
  ]


def _parts(*parts):
  return [
    {'role': 'user', 'content': list(parts)},
    {'role': 'assistant', 'content': [{'type': 'text', 'text': 'A cat.'}]},
  ]


_OPENAI = {'names': ('role', 'content')}
_LLAVA = {'roles': ('human', 'gpt')}
_WHAT = {'type': 'text', 'text': 'What is this?'}

FORMS = {
  'release': {'conversations': _talk(_SHOWN + 'What is this?', 'A cat.')},
  'llava': {
    'id': 'x',
    'image': 'a.png',
    'conversations': _talk('<image>\nWhat is this?', 'A cat.', **_LLAVA),
  },
  'field': {
    'image': 'a.png',
    'conversations': _talk('<image>\nWhat is this?', 'A cat.'),
  },
  'list of one': {
    'images': ['a.png'],
    'conversations': _talk('<image>What is this?', 'A cat.', **_LLAVA),
  },
  'messages': {
    'images': ['a.png'],
    'messages': _talk('<image>\nWhat is this?', 'A cat.', **_OPENAI),
  },
  'path': {
    'image_path': 'a.png',
    'image': '',
    'conversations': _talk('<image>\nWhat is this?', 'A cat.'),
  },
  'named by the turn': {
    'messages': [
      {
        'role': 'User ',
        'content': '<image>\nWhat is this?',
        'images': ['a.png'],
      },
      {'role': 'assistant', 'content': 'A cat.', 'images': None},
    ]
  },
  'struct': {
    'images': [{'bytes': None, 'path': 'a.png'}],
    'messages': _parts({'type': 'image'}, _WHAT),
  },
  'image_url': {
    'messages': _parts(
      {'type': 'image_url', 'image_url': {'url': 'a.png', 'detail': 'low'}},
      _WHAT,
    )
  },
  'file url': {
    'messages': _parts({'type': 'image', 'image': 'file://a.png'}, _WHAT)
  },
  'plain image_url': {
    'messages': _parts({'type': 'image_url', 'image_url': 'a.png'}, _WHAT)
  },
  'without types': {
    'messages': _parts({'image': 'a.png'}, {'text': 'What is this?'})
  },
  'named as well': {
    'image': 'a.png',
    'conversations': _talk(_SHOWN + 'What is this?', 'A cat.'),
  },
  'answer first': {
    'image': 'a.png',
    'conversations': [
      {'from': 'gpt', 'value': 'Hello!'},
      *_talk('<image>\nWhat is this?', 'A cat.', **_LLAVA),
    ],
  },
}


@pytest.mark.parametrize('form', FORMS)
def test_forms(form):
  record = conversation(FORMS[form], form)
  assert list(record.turns) == _ASKED
  assert record.images == ('a.png',) and not record.notes


def test_a_system_turn():
  spoken = [{'role': 'system', 'content': 'Be brief.'}]
  talk = _talk('Hi', 'Hello', **_OPENAI)
  expected = Turn('system', 'Be brief.')
  for entry in (
    {'messages': spoken + talk},
    {'messages': talk, 'system': 'Be brief.'},
  ):
    record = conversation(entry, 'x')
    assert record.turns[0] == expected and len(record.turns) == 3
  with pytest.raises(BadRecordError, match="turn 2: its role is 'system'"):
    conversation({'messages': talk[:1] + spoken + talk[1:]}, 'x')


def test_several_pictures_in_order():
  entry = {
    'images': ['a.png', 'b.png', 'c.png'],
    'messages': [
      {'role': 'user', 'content': 'One <image> or <image>\n?'},
      {'role': 'assistant', 'content': 'The first.'},
      {'role': 'user', 'content': [{'type': 'image'}, 'And this?']},
      {'role': 'assistant', 'content': 'No.'},
    ],
  }
  record = conversation(entry, 'x')
  assert record.images == ('a.png', 'b.png', 'c.png')
  assert record.turns[0].text == (
    'One Picture 1: <img>a.png</img>\n or Picture 2: <img>b.png</img>\n?'
  )
  assert record.turns[2].text == 'Picture 3: <img>c.png</img>\nAnd this?'


def _with(text, **entry):
  return {'conversations': _talk(text, 'A cat.')} | entry


@pytest.mark.parametrize(
  ('entry', 'reason', 'says'),
  [
    (_with('What?', image='a.png'), 'image_mismatch', 'write <image> where'),
    (_with('What?', images=['a', 'b']), 'image_mismatch', 'names 2 pictures'),
    (_with('What?', image_path='a.png'), 'image_mismatch', 'names 1 pictures'),
    ({'messages': [{'role': 'user', 'content': 'What?', 'images': ['a']},
                   {'role': 'assistant', 'content': 'A cat.'}]},
     'image_mismatch', 'names 1'),
    (_with('What?', video='a.mp4'), 'malformed', "'video', not a picture"),
    (_with('<image>What?'), 'image_mismatch', "paths under 'images'"),
    (_with('<image><image>', image='a'), 'image_mismatch', 'more pictures'),
    (_with('<image>', images=['a', 'b']), 'image_mismatch', 'shows 1'),
    (_with('Use <img> with src.'), 'unpaired_tag', '<img> at character 4'),
    (_with('a </ref> b'), 'unpaired_tag', 'closes nothing'),
    (_with('<|im_end|>'), 'control_token', 'written out'),
    (_with('<|box_start|>(1,2),(3,4)'), 'control_token', 'box_start'),
    (_with('<box>(10,20),(1500,40)</box>'), 'box_out_of_range', '0 to 999'),
    (_with('<box>(0.1,0.2),(0.3,0.4)</box>'), 'box_out_of_range', '0 to 999'),
    (_with('<box>[10, 20, 30, 40]</box>'), 'box_out_of_range', 'thousandths'),
    (_with('<box>(-1,2),(3,4)</box>'), 'box_out_of_range', 'thousandths'),
    (_with('<quad>(1,2),(3,4)</quad>'), 'box_out_of_range', 'thousandths'),
    (_with('<image>[0.1, 0.25, .5, 0.75]', image='a'), 'box_out_of_range',
     'shares'),
    (_with('<img>a</img>' * 257), 'too_long', '257 pictures'),
    ({'conversations': 5}, 'malformed', "'conversations': [{'from': 'user'"),
    ({'question': 'x'}, 'malformed', "or 'messages' of {'role'"),
    (['a'], 'malformed', 'no conversation'),
    (_with(5), 'malformed', '5 is neither text nor'),
    (_with([{'type': 'video', 'video': 'a.mp4'}]), 'malformed', 'video'),
    (_with('<image>', image={'bytes': None}), 'malformed', 'not the path'),
    (_with('<image>', image=7), 'malformed', 'not the path'),
    ({'messages': _talk('a', 'b', roles=('user', 'tool'), **_OPENAI)},
     'malformed', "turn 2: its role is 'tool'"),
    ({'conversations': _talk('a', ' ')}, 'empty_text', 'says nothing'),
    ({'conversations': _talk('a', float('nan'))}, 'empty_text', 'says nothing'),
    ({'conversations': _talk('a', None)}, 'empty_text', 'says nothing'),
    ({'conversations': [{'from': 'gpt', 'value': 'x'}]}, 'malformed',
     'no turn of the user'),
  ],
)  # fmt: skip
def test_what_is_not_learned_from(entry, reason, says):
  with pytest.raises(BadRecordError) as error:
    conversation(entry, 'r1')
  assert error.value.reason == reason
  assert says in str(error.value) and 'r1' in str(error.value)


def test_boxes_that_can_be_mended():
  for box, mended in (
    ('(0,0),(1000,999)', '(0,0),(999,999)'),
    ('(300,20),(10,400)', '(10,20),(300,400)'),
  ):
    record = conversation(_with(f'<box>{box}</box>'), 'x')
    assert record.turns[0].text == f'<box>{mended}</box>'
    assert sanitize(record)[1] == ['clipped_box']
  # As they were written where nothing is wrong, quads in any order.
  text = '<box> (1, 2),(3,4) </box><quad>(9,9),(1,9),(1,1),(9,1)</quad>'
  assert conversation(_with(text), 'x').turns[0].text == text


def _files(root, **files):
  for name, data in files.items():
    downloads.write(root, name.replace('__', '.'), data)
  downloads.write(root, 'a.png', downloads.picture())


def _records(root):
  return list(Conversations().records(root))


def test_json_and_json_lines(tmp_path):
  talks = list(FORMS.values())
  lines = '\n'.join(map(json.dumps, talks)).encode()
  _files(
    tmp_path,
    a__jsonl=b'\xef\xbb\xbf' + lines + b'\n\n{"cut',
    b__json=b'\xef\xbb\xbf' + json.dumps(talks).encode(),
    c__json=lines,
    d__json=talks[0],
    e__jsonl=b'[' * 100_000,
  )
  found = _records(tmp_path)
  good = [x for x in found if not isinstance(x, BadRecordError)]
  assert len(good) == 3 * len(talks) + 1
  assert all(list(x.turns) == _ASKED for x in good)
  assert {x.id for x in good} >= {
    'a.jsonl, line 1',
    'a.jsonl, x',
    'd.json, line 1',
  }
  bad = [x for x in found if isinstance(x, BadRecordError)]
  assert [x.reason for x in bad] == ['malformed'] * 2
  assert f'a.jsonl, line {len(talks) + 2}' in str(bad[0])


def test_a_preparation_counts_and_goes_on(tmp_path):
  _files(
    tmp_path / 'in',
    a__json=[FORMS['llava'], {'conversations': 5}, _with('Use <img> x')],
  )
  report = shards.prepare(
    'x', {'train': Conversations()}, tmp_path / 'in', tmp_path,
    limit=ErrorBudget(share=1),
  )  # fmt: skip
  assert report.lengths == {'train': [1]}
  assert report.counts.of('train') == {'malformed': 1, 'unpaired_tag': 1}


def test_files_that_never_end(tmp_path):
  os.mkfifo(tmp_path / 'a.jsonl')
  with pytest.raises(DataError, match='a.jsonl cannot be read'):
    _records(tmp_path)
  with pytest.raises(DataError, match='no file that ends in .json or .jsonl'):
    _records(tmp_path / 'nothing')
