"""Small downloads in the formats that data sets are published in."""

import io
import json
import pathlib
import pickle
import tarfile

import numpy as np
from PIL import Image


def picture(size=(40, 30), kind='JPEG', seed=0, **options) -> bytes:
  """An encoded picture of coloured noise."""
  low = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
  encoded = io.BytesIO()
  Image.fromarray(low).resize(size).save(encoded, kind, **options)
  return encoded.getvalue()


def write(root: pathlib.Path, name: str, content) -> None:
  """Bytes as they are, anything else as JSON."""
  file = root / name
  file.parent.mkdir(parents=True, exist_ok=True)
  if not isinstance(content, bytes):
    content = json.dumps(content).encode()
  file.write_bytes(content)


def tar(path: pathlib.Path, files: dict[str, bytes]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as archive:
    for name, data in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(data)
      archive.addfile(member, io.BytesIO(data))


def pairs(root, captions=('a red bus', 'two cats'), **metadata):
  """img2dataset's WebDataset output: one archive of pairs."""
  files = {}
  for number, caption in enumerate(captions):
    key = f'0000{number:05d}'
    about = {'caption': caption, 'width': 40, 'height': 30, 'status': 'success'}
    files[f'{key}.jpg'] = picture(seed=number)
    files[f'{key}.txt'] = caption.encode()
    files[f'{key}.json'] = json.dumps(about | metadata).encode()
  tar(root / '00000.tar', files)


def grit(root):
  caption = 'a bee on an apricot flower'
  pairs(
    root,
    [caption],
    noun_chunks=[[0, 5, 0.1, 0.2, 0.3, 0.4, 0.9]]
    + [[9, 26, 0.5, 0.5, 1.0, 1.0, 0.8]],
    ref_exps=[[0, 26, 0.1, 0.2, 0.3, 0.4, 0.9]],
  )


def coco_captions(root):
  for split in ('train', 'val'):
    name = f'COCO_{split}2014_000000000009.jpg'
    write(root, f'{split}2014/{name}', picture())
    write(
      root,
      f'annotations/captions_{split}2014.json',
      {
        'images': [{'id': 9, 'file_name': name, 'width': 40, 'height': 30}],
        'annotations': [
          {'image_id': 9, 'id': 1, 'caption': 'A meal.'},
          {'image_id': 9, 'id': 2, 'caption': 'A meal on a table.'},
        ],
      },
    )


def mmc4(root):
  write(root, 'a.jpg', picture())
  document = {
    'text_list': ['One.', 'Two.'],
    'image_info': [{'image_name': 'a.jpg', 'matched_text_index': 1}],
  }
  write(root, 'docs_shard_0_v2.jsonl', document)


def obelics(root):
  write(root, 'a.jpg', picture())
  document = {'texts': ['One.', None, 'Two.'], 'images': [None, 'a.jpg', None]}
  write(root, 'docs.jsonl', document)


def flickr30k(root):
  entries = []
  for number, split in enumerate(('train', 'val', 'test')):
    name = f'10{number}.jpg'
    write(root, f'flickr30k-images/{name}', picture())
    sentences = [{'raw': f'A man, {split}.', 'tokens': ['a', 'man']}] * 5
    entries.append(
      {'filename': name, 'imgid': number, 'split': split}
      | {'sentences': sentences}
    )
  write(root, 'dataset_flickr30k.json', {'images': entries, 'dataset': 'x'})


def nocaps(root):
  write(root, 'images/0013.jpg', picture())
  write(
    root,
    'nocaps_val_4500_captions.json',
    {
      'images': [{'id': 0, 'file_name': '0013.jpg', 'coco_url': 'https://x'}],
      'annotations': [{'image_id': 0, 'id': 0, 'caption': 'A baby.'}] * 10,
    },
  )


def _vqa(root, questions, annotations):
  for split in ('train', 'val'):
    write(root, f'{split}2014/COCO_{split}2014_000000000042.jpg', picture())
    asked = [
      {'image_id': 42, 'question': 'What is this?', 'question_id': 420},
      {'image_id': 42, 'question': 'How many?', 'question_id': 421},
    ]
    given = ['dog'] * 6 + ['cat'] * 4
    sure = ['no'] * 6 + ['yes'] * 4
    answers = [
      {'answer': a, 'answer_confidence': c, 'answer_id': i}
      for i, (a, c) in enumerate(zip(given, sure), start=1)
    ]
    write(
      root,
      f'{questions}_{split}2014_questions.json',
      {'questions': asked, 'data_type': 'mscoco'},
    )
    write(
      root,
      f'{annotations}_{split}2014_annotations.json',
      {
        'annotations': [
          {'question_id': x['question_id'], 'image_id': 42, 'answers': answers}
          | {'multiple_choice_answer': 'dog'}
          for x in asked
        ]
      },
    )


def vqav2(root):
  _vqa(root, 'v2_OpenEnded_mscoco', 'v2_mscoco')


def okvqa(root):
  _vqa(root, 'OpenEnded_mscoco', 'mscoco')


def gqa(root):
  write(root, 'images/2405722.jpg', picture())
  for split in ('train', 'val', 'testdev'):
    entry = {'imageId': '2405722', 'question': 'Is it red?', 'answer': 'no'}
    full = {'fullAnswer': 'No, it is green.', 'isBalanced': True}
    write(root, f'{split}_balanced_questions.json', {'07333': entry | full})


def vgqa(root):
  write(root, 'images/61512.jpg', picture())
  qas = [{'question': 'What?', 'answer': 'A hill.', 'image_id': 61512}]
  qas[0] |= {'qa_id': 991154, 'a_objects': [], 'q_objects': []}
  write(root, 'question_answers.json', [{'id': 61512, 'qas': qas}])


def dvqa(root):
  write(root, 'images/bar_1.png', picture(kind='PNG'))
  for split in ('train', 'val_easy', 'val_hard'):
    entry = {'image': 'bar_1.png', 'question': 'How tall?', 'answer': '5'}
    more = {'question_id': 7, 'template_id': 'data', 'answer_bbox': []}
    write(root, f'{split}_qa.json', [entry | more])


def ocrvqa(root):
  entries = {}
  for split in (1, 2, 3):
    key = f'076456{split}'
    write(root, f'images/{key}.jpg', picture())
    entries[key] = {
      'imageURL': 'http://ecx.images/I/51.jpg',
      'questions': ['Who wrote this?', 'Which genre?'],
      'answers': ['Ann Author', 'Travel'],
      'title': 'A Book',
      'split': split,
    }
  write(root, 'dataset.json', entries)


def docvqa(root):
  write(root, 'documents/x_1.png', picture(kind='PNG'))
  for split in ('train', 'val'):
    entry = {'questionId': 337, 'question': 'What date?', 'docId': 279}
    entry |= {'image': 'documents/x_1.png', 'answers': ['1/8/93', '1.8.93']}
    write(root, f'{split}_v1.0_withQT.json', {'data': [entry]})


def textvqa(root):
  write(root, 'train_images/0054c91.jpg', picture())
  for split in ('train', 'val'):
    entry = {'question': 'what brand?', 'image_id': '0054c91'}
    entry |= {'question_id': 3, 'answers': ['nous'] * 3 + ['dakota'] * 7}
    write(root, f'TextVQA_0.5.1_{split}.json', {'data': [entry]})


def chartqa(root):
  for split in ('train', 'val', 'test'):
    write(root, f'{split}/png/41.png', picture(kind='PNG'))
    for kind in ('human', 'augmented'):
      entry = {'imgname': '41.png', 'query': 'How many?', 'label': '14'}
      write(root, f'{split}/{split}_{kind}.json', [entry])


def ai2d(root):
  for name in ('1', '2'):
    write(root, f'images/{name}.png', picture(kind='PNG'))
    asked = {'answerTexts': ['fish', 'owl', 'cat', 'dog'], 'correctAnswer': 1}
    asked |= {'abcLabel': False, 'questionId': f'{name}.png-0'}
    entry = {'imageName': f'{name}.png', 'questions': {'Who eats?': asked}}
    write(root, f'questions/{name}.png.json', entry)
  write(root, 'ai2d_test_ids.csv', b'2\n')


def scienceqa(root):
  problems = {}
  for key, split in enumerate(('train', 'val', 'test'), start=1):
    write(root, f'{split}/{key}/image.png', picture(kind='PNG'))
    problems[str(key)] = {
      'question': 'Which is a magnet?',
      'choices': ['a spoon', 'a compass'],
      'answer': 1,
      'hint': 'Look.',
      'image': 'image.png',
      'split': split,
    }
    problems[f'{key}0'] = problems[str(key)] | {'image': None}
  write(root, 'problems.json', problems)


def vizwiz(root):
  for split in ('train', 'val'):
    write(root, f'{split}/VizWiz_{split}_0.jpg', picture())
    entry = {'image': f'VizWiz_{split}_0.jpg', 'question': "What's this?"}
    entry['answers'] = [
      {'answer': 'basil', 'answer_confidence': 'yes'},
      {'answer': 'spice', 'answer_confidence': 'maybe'},
    ]
    write(root, f'Annotations/{split}.json', [entry | {'answerable': 1}])


def _refer(root, refs, splits):
  write(root, 'train2014/COCO_train2014_000000581857.jpg', picture())
  entries, instances = [], []
  for number, split in enumerate(splits):
    sentences = [{'sent': 'lady in blue', 'tokens': [], 'sent_id': number}]
    entries.append(
      {'ref_id': number, 'ann_id': number, 'image_id': 581857, 'split': split}
      | {'file_name': 'x.jpg', 'sentences': sentences, 'category_id': 1}
    )
    instances.append({'id': number, 'bbox': [4, 3, 10, 20], 'image_id': 581857})
  write(root, refs, pickle.dumps(entries, protocol=0))
  image = {'id': 581857, 'file_name': 'COCO_train2014_000000581857.jpg'}
  image |= {'width': 40, 'height': 30}
  write(root, 'instances.json', {'annotations': instances, 'images': [image]})


def refcoco(root):
  _refer(root, 'refs(unc).p', ('train', 'val', 'testA', 'testB'))


refcoco_plus = refcoco


def refcocog(root):
  _refer(root, 'refs(umd).p', ('train', 'val', 'test'))


def visual_genome(root):
  write(root, 'images/2.jpg', picture())
  region = {'x': 5, 'y': 6, 'width': 10, 'height': 12, 'phrase': 'the clock'}
  region |= {'region_id': 1382, 'image_id': 2}
  write(root, 'region_descriptions.json', [{'id': 2, 'regions': [region]}])


def download(name: str, root: pathlib.Path) -> pathlib.Path:
  """A small download of a data set of the catalogue."""
  globals().get(name, pairs)(root)
  return root
