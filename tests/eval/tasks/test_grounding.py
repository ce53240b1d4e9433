import dataclasses
import json
import pickle

import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import registry, runner

BOX = [10.0, 4.0, 20.0, 8.0]  # x, y, width, height in pixels of 40 x 20


def refcoco(
  files, name='refcoco', refs='refs(unc).p', size=(40, 20), **picture
):
  entries = [
    {
      'ref_id': 1,
      'ann_id': 55,
      'image_id': 9,
      'split': split,
      'category_id': 1,
      'sent_ids': [1, 2],
      'sentences': [
        {'sent': x, 'raw': x, 'sent_id': i, 'tokens': x.split()}
        for i, x in enumerate(['left dog', 'the brown one'])
      ],
    }
    for split in ('val', 'train')
  ]
  files.write('refcoco/refs(unc).p', pickle.dumps(entries))
  files.json(
    'refcoco/instances.json',
    {
      'images': [
        {
          'id': 9,
          'file_name': 'COCO_train2014_000000000009.jpg',
          'width': size[0],
          'height': size[1],
        }
      ],
      'annotations': [{'id': 55, 'image_id': 9, 'bbox': BOX}],
      'categories': [],
    },
  )
  files.pictures('refcoco/train2014/COCO_train2014_000000000009.jpg', **picture)


def said(x1, y1, x2, y2):
  return f'({x1},{y1}),({x2},{y2})</box>'


def test_refcoco(files, run):
  refcoco(files)
  task = registry.get('refcoco_val')
  # The true box is a quarter to three quarters by a fifth to three fifths; the
  # second answer covers half of it, and the last digits decide.
  replies = {
    'val/9/0': said(250, 200, 749, 599),
    'val/9/1': said(250, 200, 498, 599),
  }
  scores, outcome, _ = run(task, replies, 2)
  assert scores['precision'] == 0.5
  assert outcome.items[0].scores['iou'] == pytest.approx(1, abs=0.01)
  example = outcome.items[0].example
  assert example.prompt.parts[1] == '<ref>left dog</ref><box>'
  assert example.boxes == ((250, 200, 750, 600),)


def test_boxes_turn_with_the_picture(files, run):
  """A picture stored on its side: boxes are of the stored pixels."""
  refcoco(files, orientation=6)
  task = dataclasses.replace(registry.get('refcoco_val'), count=2)
  [first, _] = task.examples(files.root)
  # 40 x 20 is shown as 20 x 40, turned clockwise: x = 20 - y, y = x.
  assert first.target == {'box': [8, 10, 16, 30], 'size': [20, 40]}
  scores, *_ = run(task, lambda x: said(400, 250, 799, 749))
  assert scores['precision'] == 1


def test_boxes_of_another_picture_are_named(files):
  refcoco(files, size=(640, 480))
  with pytest.raises(DataError, match='640 x 480.*but the picture has 40 x 20'):
    list(registry.get('refcoco_val').examples(files.root))


def test_the_release_file_stands_for_the_authors(files, run):
  line = {
    'image': 'data/coco/train2014/COCO_train2014_000000000009.jpg',
    'sent': 'left dog',
    'bbox': [10.0, 4.0, 30.0, 12.0],
    'height': 20,
    'width': 40,
  }
  files.write('refcoco_plus/refcoco+_testA.jsonl', json.dumps(line).encode())
  files.pictures('refcoco_plus/train2014/COCO_train2014_000000000009.jpg')
  task = registry.get('refcoco_plus_testA')
  scores, *_ = run(task, lambda x: said(250, 200, 749, 599), 1)
  assert scores['precision'] == 1


class Evil:
  def __reduce__(self):
    return print, ('executed',)


def test_a_pickle_runs_no_code(files, capsys):
  refcoco(files)
  files.write('refcoco/refs(unc).p', pickle.dumps([Evil()]))
  task = dataclasses.replace(registry.get('refcoco_val'), count=2)
  with pytest.raises(DataError, match='no pickle|not a pickle of plain data'):
    runner.take(task, files.root)
  assert not capsys.readouterr().out


def test_grit_is_submitted(files, run):
  files.json(
    'GRIT/samples/test/refexp.json',
    [
      {
        'example_id': 'refexp_0',
        'image_id': 'coco/test2015/1.jpg',
        'task_name': 'refexp',
        'task_query': 'darker red dome',
        'task_bbox': None,
        'output_options': None,
      }
    ],
  )
  files.pictures('GRIT/images/coco/test2015/1.jpg')
  task = registry.get('grit_refexp_test')
  scores, outcome, folder = run(task, lambda x: said(250, 200, 749, 599))
  assert scores == {}
  assert json.loads((folder / 'refexp.json').read_text()) == [
    {'example_id': 'refexp_0', 'confidence': 1.0, 'bboxes': [[10, 4, 30, 12]]}
  ]


def test_grit_samples_with_answers_are_scored(files, run):
  files.json(
    'GRIT/samples/ablation/refexp.json',
    [
      {
        'input': {'image_path': '1.jpg', 'task_query': 'tv'},
        'gt': {'bboxes': [[10, 4, 30, 12]], 'mask': None},
      }
    ],
  )
  files.pictures('GRIT/images/1.jpg')
  scores, *_ = run(registry.get('grit_refexp_ablation'), lambda x: 'no idea')
  assert scores == {'precision': 0, 'iou': 0}
