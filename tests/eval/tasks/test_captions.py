import dataclasses

import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.eval import registry, runner


def karpathy(files):
  """Karpathy's file: two pictures of the test split, four of the others."""
  images = []
  for number, split in enumerate(['test', 'train', 'train', 'test', 'val']):
    name = f'{1000 + number}.jpg'
    images.append(
      {
        'sentids': [5 * number, 5 * number + 1],
        'imgid': number,
        'sentences': [
          {'tokens': [], 'raw': text, 'imgid': number, 'sentid': i}
          for i, text in enumerate(
            [f'Dog {number} runs on grass.', f'A dog, number {number}, plays.']
          )
        ],
        'split': split,
        'filename': name,
      }
    )
    files.pictures(f'flickr30k/flickr30k-images/{name}')
  files.json(
    'flickr30k/dataset_flickr30k.json',
    {'images': images, 'dataset': 'flickr30k'},
  )


def test_flickr30k(files, run):
  pytest.importorskip('pycocoevalcap')
  karpathy(files)
  task = registry.get('flickr30k_test')
  said = {
    'dataset_flickr30k.json/0': 'dog 0 runs on the grass',
    'dataset_flickr30k.json/3': 'a cat',
  }
  scores, outcome, _ = run(task, said, 2)
  assert scores.keys() == {'cider', 'bleu4', 'rouge_l', 'meteor'}
  # Each caption has its share of the corpus's score.
  shares = [item.scores['cider'] for item in outcome.items]
  assert scores['cider'] == pytest.approx(sum(shares) / 2)
  assert shares[0] > 1 > shares[1]
  prompt = outcome.items[0].example.prompt
  assert prompt.text == ('<img>1000.jpg</img>Describe the image in English:')
  assert task.decoding.min_tokens == 8


def test_few_shot_captions(files):
  karpathy(files)
  task = dataclasses.replace(registry.get('flickr30k_test_2shot'), count=2)
  runner.take(task, files.root)
  for example in task.examples(files.root):
    shown = [str(x) for x in example.prompt.pictures[:2]]
    assert set(shown) <= {'1001.jpg', '1002.jpg'}
    assert example.prompt.parts[1].startswith('Describe the image in English: ')
  release = registry.get('flickr30k_test_2shot_release')
  drawn = {
    str(x)
    for example in release.examples(files.root)
    for x in example.prompt.pictures[:2]
  }
  assert drawn <= {'1000.jpg', '1003.jpg'}
  with pytest.raises(DataError, match='8 examples are to be drawn from 4'):
    list(registry.get('flickr30k_test_8shot').examples(files.root))


def test_nocaps(files):
  files.json(
    'nocaps/nocaps_val_4500_captions.json',
    {
      'info': {},
      'licenses': [],
      'images': [
        {
          'id': 0,
          'open_images_id': '0013ea2087020901',
          'file_name': '0013ea2087020901.jpg',
          'domain': 'near-domain',
        }
      ],
      'annotations': [
        {'image_id': 0, 'id': i, 'caption': f'A baby {i}.'} for i in range(10)
      ],
    },
  )
  files.pictures('nocaps/images/0013ea2087020901.jpg')
  task = dataclasses.replace(registry.get('nocaps_val'), count=1)
  runner.take(task, files.root)
  [example] = task.examples(files.root)
  assert len(example.target) == 10
