"""Conversations of the web demo: boxes, files that are shared."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from serve_support import encoded

from qwenvl_jax.serve import web_demo_turns as turns_lib
from qwenvl_jax.serve.limits import ApiError, Limits
from qwenvl_jax.serve.web_demo_turns import Turn
from qwenvl_jax.text import drawing

BOX = '<ref>狗</ref><box>(250,100),(750,900)</box>'


def shows_box(path, size):
  """Whether a picture of this form has the first colour's frame on it."""
  drawn = np.asarray(Image.open(path).convert('RGB')).astype(int)
  assert drawn.shape[1] / drawn.shape[0] == pytest.approx(size[0] / size[1])
  height, width, _ = drawn.shape
  edge = drawn[height // 2, width // 4 - 1 : width // 4 + 2]
  return bool((abs(edge - drawing.COLOURS[0]).sum(-1) < 60).any())


def test_boxes_are_drawn_on_the_picture_they_belong_to(picture, tmp_path):
  sizes = [(64, 48), (48, 96)]
  turns = [
    Turn('What is this?', (picture(sizes[0]),), 'A dog.'),
    Turn('And where?', (picture(sizes[1]),), BOX),
  ]
  turns_lib.draw_boxes(turns, tmp_path)
  ((number, path),) = turns[-1].drawn
  assert number == 2 and shows_box(path, sizes[1])
  assert not turns[-1].lacking  # 狗 is in the font that comes along
  # A question or an answer that names another picture is about that one.
  for turns[-1].text, turns[-1].answer in (
    ('Where in picture 1?', BOX),
    ('第1张图里的狗在哪里？', BOX),
    ('Where?', f'In Picture 1: {BOX}'),
  ):
    turns_lib.draw_boxes(turns, tmp_path)
    ((number, path),) = turns[-1].drawn
    assert number == 1 and shows_box(path, sizes[0])
  turns[-1].answer = f'图1：{BOX}，图2：{BOX}'
  turns_lib.draw_boxes(turns, tmp_path)
  assert [number for number, _ in turns[-1].drawn] == [1, 2]
  # Pictures that are not there get no boxes.
  assert turns_lib.places_by_picture('Picture 7?', BOX, 0) == {}
  assert [*turns_lib.places_by_picture('Picture 7?', BOX, 2)] == [2]


def test_answers_are_readable():
  read = turns_lib.readable
  assert read(f'I see {BOX}.') == 'I see **狗**.'
  assert read('<ref>a dog</ref><box>(1,') == '**a dog**'
  assert read('<box>(1,2)</box> there') == 'there `<box>(1,2)</box>`'


def test_a_shared_conversation_opens_again(picture, tmp_path):
  turns = [
    Turn('What is it?', (picture(), picture((9, 9), 'JPEG')), f'I see {BOX}'),
    Turn('谁？ <ref>x</ref>', (), 'Nobody'),
    Turn('Unanswered'),
  ]
  text = turns_lib.share(turns, 'tiny', Limits())
  folder = tmp_path / 'elsewhere'
  folder.mkdir()
  again = turns_lib.open_shared(text.encode(), folder, Limits())
  assert [(turn.text, turn.answer) for turn in again] == [
    (turn.text, turn.answer) for turn in turns
  ]
  for old, new in zip(turns, again, strict=True):
    assert [p.read_bytes() for p in old.pictures] == [
      p.read_bytes() for p in new.pictures
    ]
    assert all(path.is_relative_to(folder) for path in new.pictures)


def shared(*messages, kind='qwenvl_jax conversation'):
  return json.dumps({'kind': kind, 'messages': messages}).encode()


def asked(url):
  part = {'type': 'image_url', 'image_url': {'url': url}}
  return {'role': 'user', 'content': [part]}


def data_url(data):
  return f'data:image/png;base64,{base64.b64encode(data).decode()}'


@pytest.mark.parametrize(
  ('data', 'said'),
  [
    (b'\xff\xfe', 'not a conversation'),
    (b'[' * 100_000, 'not a conversation'),
    (shared(kind='another'), 'not a conversation'),
    (shared({'role': 'assistant', 'content': 'x'}), 'not a conversation'),
    (shared({'role': 'system', 'content': 'x'}), 'not a conversation'),
    (shared(asked('file:///etc/passwd')), 'not a conversation'),
    (shared(asked('http://example.org/a.png')), 'not a conversation'),
    (shared(asked(data_url(b'GIF89a'))), 'not a readable picture'),
    (shared(asked(data_url(encoded(kind='TIFF')))), 'not a readable picture'),
    (shared(asked(data_url(encoded((9000, 9000))))), 'pixels together'),
  ],
)
def test_other_files_are_refused(data, said, tmp_path):
  with pytest.raises(ApiError, match=said):
    turns_lib.open_shared(data, tmp_path, Limits())
  assert not [*tmp_path.iterdir()]


def test_a_conversation_asks_for_no_more_than_a_body(picture):
  turns = [Turn('?', (picture(),))]
  with pytest.raises(ApiError, match='too large together'):
    turns_lib.to_messages(turns, Limits(body_bytes=50))
  turns[0].pictures[0].unlink()
  with pytest.raises(ApiError, match='no longer here'):
    turns_lib.to_messages(turns, Limits())
