import json

import downloads
import pytest
import tensorflow_datasets as tfds

from qwenvl_jax.data import catalogue, shards, sources, storage
from qwenvl_jax.data.records import Qa, Region


@pytest.fixture(scope='module')
def prepared_all(tmp_path_factory):
  """Every data set of the catalogue, prepared from a small download."""
  base = tmp_path_factory.mktemp('all')
  reports = {}
  for name, entry in catalogue.DATA_SETS.items():
    manual = downloads.download(name, base / 'downloads' / name)
    reports[name] = shards.prepare(name, entry.splits, manual, base / 'data')
  return str(base / 'data'), reports


# What the first record of `train` (or of the one split) must say.
EXPECTED = {
  'laion_zh': {'language': 'zh', 'captions': ('a red bus',)},
  'coco_captions': {'captions': ('A meal.', 'A meal on a table.')},
  'flickr30k': {'captions': ('A man, train.',) * 5},
  'nocaps': {'captions': ('A baby.',) * 10},
  'gqa': {'questions': (Qa('Is it red?', 'no', id='07333'),)},
  'vgqa': {'questions': (Qa('What?', 'A hill.', id='991154'),)},
  'dvqa': {'questions': (Qa('How tall?', '5', id='7'),)},
  'ocrvqa': {
    'questions': (
      Qa('Who wrote this?', 'Ann Author', id='0764561/0'),
      Qa('Which genre?', 'Travel', id='0764561/1'),
    )
  },
  'docvqa': {
    'questions': (Qa('What date?', '1/8/93', ('1/8/93', '1.8.93'), id='337'),)
  },
  'textvqa': {
    'questions': (
      Qa('what brand?', 'dakota', ('nous',) * 3 + ('dakota',) * 7, id='3'),
    )
  },
  'ai2d': {
    'questions': (
      Qa('Who eats?', 'owl', options=('fish', 'owl', 'cat', 'dog'),
         id='1.png-0'),
    )
  },
  'scienceqa': {
    'questions': (
      Qa('Which is a magnet?', 'a compass', options=('a spoon', 'a compass'),
         context='Look.', id='1'),
    )
  },
  'vizwiz': {
    'questions': (Qa("What's this?", 'basil', ('basil', 'spice'), id='0'),)
  },
  'refcoco': {'regions': (Region('lady in blue', ((4, 3, 14, 23),)),)},
  'refcocog': {'regions': (Region('lady in blue', ((4, 3, 14, 23),)),)},
  'mmc4': {'texts': ('One.', 'Two.')},
  'obelics': {'texts': ('One.', 'Two.')},
  'visual_genome': {'regions': (Region('the clock', ((5, 6, 15, 18),)),)},
}  # fmt: skip


@pytest.mark.parametrize('name', catalogue.DATA_SETS)
def test_prepared_from_its_original_format(name, prepared_all):
  data_dir, reports = prepared_all
  entry, report = catalogue.DATA_SETS[name], reports[name]
  assert report.lengths.keys() == entry.splits.keys()
  for split in entry.splits:
    source = sources.Prepared(name, split, data_dir).open()
    assert len(source) == sum(report.lengths[split]) > 0
    assert not report.counts.of(split)
    for index in range(len(source)):
      record = source[index]
      assert record.size == (40, 30) and len(record.images) == 1
  split = 'train' if 'train' in entry.splits else next(iter(entry.splits))
  first = sources.Prepared(name, split, data_dir).open()[0]
  for field, value in EXPECTED.get(name, {}).items():
    assert getattr(first, field) == value


@pytest.mark.parametrize('name', ['vqav2', 'okvqa'])
def test_the_surest_answer_not_the_most_frequent(name, prepared_all):
  source = sources.Prepared(name, 'train', prepared_all[0]).open()
  (record,) = source
  assert [x.answer for x in record.questions] == ['cat', 'cat']
  assert record.questions[0].answers == ('dog',) * 6 + ('cat',) * 4
  assert [x.id for x in record.questions] == ['420', '421']


def test_chartqa_keeps_its_two_kinds_apart(prepared_all):
  for kind in ('human', 'augmented'):
    source = sources.Prepared('chartqa', f'test_{kind}', prepared_all[0])
    assert source.open()[0].questions[0].answer == '14'


def test_grit_boxes_are_pixels_of_the_picture(prepared_all):
  record = sources.Prepared('grit', 'train', prepared_all[0]).open()[0]
  (region,) = record.regions
  assert region.phrase == 'a bee on an apricot flower'
  assert region.boxes[0] == pytest.approx((4, 6, 12, 12))
  (grounded,) = record.grounded
  texts = [grounded.text[x.start : x.end] for x in grounded.spans]
  assert texts == ['a bee', 'an apricot flower', 'a bee on an apricot flower']


@pytest.mark.parametrize('name', catalogue.DATA_SETS)
def test_tfds_reads_what_was_prepared(name, prepared_all):
  data_dir, reports = prepared_all
  for builder in (
    tfds.builder_from_directory(reports[name].folder),
    # Without the version, TFDS takes its own coco_captions.
    tfds.builder(f'{name}:{storage.VERSION}', data_dir=data_dir),
  ):
    assert builder.info.name == name
    assert str(builder.info.file_format) == 'FileFormat.ARRAY_RECORD'
    assert set(builder.info.features) == {'id', 'images', 'annotation'}
    lengths = {k: v.shard_lengths for k, v in builder.info.splits.items()}
    assert lengths == reports[name].lengths
  for split in lengths:
    whole = f'{name}:{storage.VERSION}'
    source = tfds.data_source(whole, split=split, data_dir=data_dir)
    assert len(source) == sum(lengths[split])
    theirs = builder.as_data_source(split=split)
    ours = sources.Prepared(name, split, data_dir).open()
    assert len(theirs) == len(ours)
    for example, record in zip(theirs, ours, strict=True):
      assert example['id'].decode() == record.id
      assert tuple(example['images']) == record.images
      annotation = json.loads(example['annotation'])
      assert len(annotation.get('questions', ())) == len(record.questions)
      assert tuple(annotation.get('captions', ())) == record.captions


def test_every_entry_tells_where_and_under_which_licence():
  for entry in catalogue.DATA_SETS.values():
    assert entry.url.startswith('https://') and entry.licence and entry.put
    assert entry.task in (
      'caption', 'vqa', 'referring', 'grounding', 'interleaved',
    )  # fmt: skip
