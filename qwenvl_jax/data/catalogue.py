"""The public data sets of the paper: what they are and where to get them.

Nothing here downloads anything: licences have to be accepted by a person.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwenvl_jax.data.readers.answers import (
  Ai2d,
  OcrVqa,
  QaTable,
  ScienceQa,
  VisualGenomeQa,
  VqaPair,
)
from qwenvl_jax.data.readers.captions import CocoCaptions, Karpathy
from qwenvl_jax.data.readers.conversations import Conversations
from qwenvl_jax.data.readers.img2dataset import Img2Dataset
from qwenvl_jax.data.readers.interleaved import Interleaved
from qwenvl_jax.data.readers.places import Refer, VisualGenomeRegions
from qwenvl_jax.data.readers.release import EvaluationLines, PlainText
from qwenvl_jax.data.readers.spreadsheet import Spreadsheet


@dataclasses.dataclass(frozen=True)
class DataSet:
  """A public data set.

  Attributes:
    name: as the mixtures call it.
    task: what it is for.
    size: what its authors say it holds.
    url: where to get it.
    licence: what its authors say; of the annotations, pictures often belong to
      others.
    put: what to put into the folder given as `--manual_dir`.
    splits: readers by split.
  """

  name: str
  task: str
  size: str
  url: str
  licence: str
  put: str
  splits: Mapping[str, Any]


_COCO = (
  'images from https://cocodataset.org/#download: train2014.zip, val2014.zip'
)
_IMG2DATASET = (
  'the output of `img2dataset --input_format parquet --output_format '
  'webdataset` on the list of URLs (.tar files; parquet output works as well)'
)
_GENOME = (
  'the pictures of VG_100K and VG_100K_2 together in images/, from '
  'https://homes.cs.washington.edu/~ranjay/visualgenome/api.html'
)


def _pairs(name, task, size, url, licence, *, language='en', grounded=False):
  reader = Img2Dataset(language=language, grounded=grounded)
  return DataSet(
    name, task, size, url, licence, _IMG2DATASET, {'train': reader}
  )


def _vqa_pair(questions, annotations, split):
  return VqaPair(
    questions=f'{questions}_{split}2014_questions.json',
    annotations=f'{annotations}_{split}2014_annotations.json',
    image=f'COCO_{split}2014_{{:012d}}.jpg',
    folder=f'{split}2014',
  )


def _refer(name, size, refs, splits):
  archive = name.replace('_plus', '+')
  return DataSet(
    name,
    'referring',
    size,
    'https://github.com/lichengunc/refer',
    'Apache-2.0 (code); pictures: Flickr terms of COCO',
    f'{refs} and instances.json of {archive}.zip, train2014/; {_COCO}',
    {split: Refer(split, refs=refs) for split in splits},
  )


def _text_vqa(split):
  return QaTable(
    f'TextVQA_0.5.1_{split}.json',
    image='{}.jpg',
    folder='train_images',
    at='data',
    image_key='image_id',
    answer_key='answers',
  )


def _chart_qa(folder, kind):
  return QaTable(
    f'{folder}/{folder}_{kind}.json',
    folder=f'{folder}/png',
    image_key='imgname',
    question_key='query',
    answer_key='label',
  )


_ALL = (
  _pairs(
    'laion_en', 'caption', '2.3 billion pairs, 280 million kept',
    'https://laion.ai/blog/laion-5b/', 'CC-BY-4.0 (URLs and metadata)',
  ),
  _pairs(
    'laion_zh', 'caption', '143 million pairs, 105 million kept',
    'https://laion.ai/blog/laion-5b/ (laion2B-multi, language zh)',
    'CC-BY-4.0 (URLs and metadata)', language='zh',
  ),
  _pairs(
    'laion_coco', 'caption', '600 million pairs, 300 million kept',
    'https://laion.ai/blog/laion-coco/', 'CC-BY-4.0 (URLs and metadata)',
  ),
  _pairs(
    'datacomp', 'caption', '1.4 billion pairs, 300 million kept',
    'https://www.datacomp.ai', 'CC-BY-4.0 (URLs and metadata)',
  ),
  _pairs(
    'coyo', 'caption', '700 million pairs, 200 million kept',
    'https://github.com/kakaobrain/coyo-dataset', 'CC-BY-4.0',
  ),
  _pairs(
    'cc12m', 'caption', '12 million pairs, 8 million kept',
    'https://github.com/google-research-datasets/conceptual-12m',
    'free use with attribution to Google',
  ),
  _pairs(
    'cc3m', 'caption', '3.3 million pairs, 3 million kept',
    'https://ai.google.com/research/ConceptualCaptions',
    'free use with attribution to Google',
  ),
  _pairs(
    'sbu', 'caption', '1 million pairs, 0.8 million kept',
    'https://www.cs.rice.edu/~vo9/sbucaptions/', 'research',
  ),
  DataSet(
    'coco_captions', 'caption', '123,287 images, 616,767 captions',
    'https://cocodataset.org/#download',
    'CC-BY-4.0; pictures: Flickr terms',
    f'annotations/captions_*2014.json, train2014/, val2014/; {_COCO}',
    {
      split: CocoCaptions(f'annotations/captions_{split}2014.json',
                          f'{split}2014')
      for split in ('train', 'val')
    },
  ),
  DataSet(
    'flickr30k', 'caption', '31,014 images, 155,070 captions',
    'https://shannon.cs.illinois.edu/DenotationGraph/',
    'research and education; pictures: Flickr terms',
    'flickr30k-images/ and dataset_flickr30k.json of Karpathy, '
    'https://cs.stanford.edu/people/karpathy/deepimagesent/',
    {
      split: Karpathy('dataset_flickr30k.json', 'flickr30k-images', split)
      for split in ('train', 'val', 'test')
    },
  ),
  DataSet(
    'nocaps', 'caption', '4,500 images (validation), 10 captions each',
    'https://nocaps.org/download', 'CC-BY-2.0',
    'nocaps_val_4500_captions.json, and its pictures in images/',
    {'val': CocoCaptions('nocaps_val_4500_captions.json', 'images')},
  ),
  DataSet(
    'vqav2', 'vqa', '204,721 images, 1.1 million questions',
    'https://visualqa.org/download.html', 'CC-BY-4.0',
    'v2_OpenEnded_mscoco_*2014_questions.json, '
    f'v2_mscoco_*2014_annotations.json, train2014/, val2014/; {_COCO}',
    {
      split: _vqa_pair('v2_OpenEnded_mscoco', 'v2_mscoco', split)
      for split in ('train', 'val')
    },
  ),
  DataSet(
    'okvqa', 'vqa', '14,031 images, 14,055 questions',
    'https://okvqa.allenai.org/download.html', 'CC-BY-4.0',
    'OpenEnded_mscoco_*2014_questions.json, mscoco_*2014_annotations.json, '
    f'train2014/, val2014/; {_COCO}',
    {
      split: _vqa_pair('OpenEnded_mscoco', 'mscoco', split)
      for split in ('train', 'val')
    },
  ),
  DataSet(
    'gqa', 'vqa', '113,018 images, 1.7 million balanced questions',
    'https://cs.stanford.edu/people/dorarad/gqa/download.html', 'CC-BY-4.0',
    '{train,val,testdev}_balanced_questions.json and images/',
    {
      split: QaTable(
        f'{split}_balanced_questions.json', image='{}.jpg', folder='images',
        image_key='imageId',
      )
      for split in ('train', 'val', 'testdev')
    },
  ),
  DataSet(
    'vgqa', 'vqa', '108,077 images, 1.4 million questions',
    'https://homes.cs.washington.edu/~ranjay/visualgenome/api.html',
    'CC-BY-4.0', f'question_answers.json; {_GENOME}',
    {'train': VisualGenomeQa()},
  ),
  DataSet(
    'dvqa', 'vqa', '300,000 charts, 3.5 million questions',
    'https://github.com/kushalkafle/DVQA_dataset', 'CC-BY-NC-4.0',
    '{train,val_easy,val_hard}_qa.json and images/',
    {
      split: QaTable(f'{split}_qa.json', folder='images')
      for split in ('train', 'val_easy', 'val_hard')
    },
  ),
  DataSet(
    'ocrvqa', 'vqa', '207,572 book covers, 1 million questions',
    'https://ocr-vqa.github.io', 'research; covers belong to publishers',
    'dataset.json, and images/ as its loadDataset.py stores them',
    {
      split: OcrVqa(number)
      for number, split in enumerate(('train', 'val', 'test'), start=1)
    },
  ),
  DataSet(
    'docvqa', 'vqa', '12,767 pages, 50,000 questions',
    'https://rrc.cvc.uab.es/?ch=17&com=downloads', 'research (registration)',
    '{train,val}_v1.0_withQT.json and documents/',
    {
      split: QaTable(
        f'{split}_v1.0_withQT.json', at='data', answer_key='answers',
        id_key='questionId',
      )
      for split in ('train', 'val')
    },
  ),
  DataSet(
    'textvqa', 'vqa', '28,408 images, 45,336 questions',
    'https://textvqa.org/dataset/', 'CC-BY-4.0',
    'TextVQA_0.5.1_{train,val}.json and train_images/',
    {split: _text_vqa(split) for split in ('train', 'val')},
  ),
  DataSet(
    'chartqa', 'vqa', '20,882 charts, 32,719 questions',
    'https://github.com/vis-nlp/ChartQA', 'GPL-3.0',
    "the folders train/, val/ and test/ of its 'ChartQA Dataset'",
    {
      f'{folder}_{kind}': _chart_qa(folder, kind)
      for folder in ('train', 'val', 'test')
      for kind in ('human', 'augmented')
    },
  ),
  DataSet(
    'ai2d', 'vqa', '4,903 diagrams, 15,501 questions',
    'https://prior.allenai.org/projects/diagram-understanding',
    'CC-BY-SA', 'questions/, images/ and ai2d_test_ids.csv',
    {'train': Ai2d(test=False), 'test': Ai2d(test=True)},
  ),
  DataSet(
    'scienceqa', 'vqa', '10,332 questions with a picture (of 21,208)',
    'https://scienceqa.github.io', 'CC-BY-NC-SA-4.0',
    'problems.json and the folders train/, val/, test/ of pictures',
    {split: ScienceQa(split) for split in ('train', 'val', 'test')},
  ),
  DataSet(
    'vizwiz', 'vqa', '31,173 images and questions',
    'https://vizwiz.org/tasks-and-datasets/vqa/', 'CC-BY-4.0',
    'Annotations/{train,val}.json and the folders train/, val/ of pictures',
    {
      split: QaTable(f'Annotations/{split}.json', folder=split,
                     answer_key='answers')
      for split in ('train', 'val')
    },
  ),
  _refer('refcoco', '19,994 images, 142,209 phrases', 'refs(unc).p',
         ('train', 'val', 'testA', 'testB')),
  _refer('refcoco_plus', '19,992 images, 141,564 phrases', 'refs(unc).p',
         ('train', 'val', 'testA', 'testB')),
  _refer('refcocog', '25,799 images, 95,010 phrases', 'refs(umd).p',
         ('train', 'val', 'test')),
  DataSet(
    'visual_genome', 'referring', '108,077 images, 5.4 million phrases',
    'https://homes.cs.washington.edu/~ranjay/visualgenome/api.html',
    'CC-BY-4.0', f'region_descriptions.json; {_GENOME}',
    {'train': VisualGenomeRegions()},
  ),
  _pairs(
    'grit', 'grounding', '20.5 million images, 137 million boxes',
    'https://huggingface.co/datasets/zzliang/GRIT',
    'MS-PL; pictures belong to others', grounded=True,
  ),
  DataSet(
    'mmc4', 'interleaved', '101 million documents, 571 million images',
    'https://github.com/allenai/mmc4', 'ODC-BY; pictures belong to others',
    'its .jsonl files, unzipped, and the pictures that they name beside them',
    {'train': Interleaved()},
  ),
  DataSet(
    'obelics', 'interleaved', '141 million documents, 353 million images',
    'https://huggingface.co/datasets/HuggingFaceM4/OBELICS',
    'CC-BY-4.0; pictures belong to others',
    'its records as .jsonl, with the path of a downloaded picture in the place '
    'of each URL, and the pictures; or as .parquet with their bytes',
    {'train': Interleaved()},
  ),
)  # fmt: skip

DATA_SETS = {x.name: x for x in _ALL}

# Formats that any folder may be in, for data of one's own (`--format`).
FORMATS = {
  'img2dataset': Img2Dataset(),
  'img2dataset-zh': Img2Dataset(language='zh'),
  'grit': Img2Dataset(grounded=True),
  'evaluation': EvaluationLines(),
  'conversations': Conversations(),
  'csv': Spreadsheet(),
  'interleaved': Interleaved(),
  'text': PlainText(),
  'text-zh': PlainText(language='zh'),
}
