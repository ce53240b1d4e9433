"""A small corpus of picture-text pairs to clean, in all three formats."""

import io
import json
import random
import tarfile

import numpy as np
from PIL import Image

from qwenvl_jax.data.cleaning import image_rules, text_rules, unique
from qwenvl_jax.data.cleaning.pair import Pair, Picture
from qwenvl_jax.data.cleaning.shards import Job


def photo(seed: int, size=(160, 120)) -> Image.Image:
  """A picture unlike those of other seeds."""
  draw = np.random.default_rng(seed)
  coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
  return coarse.resize(size, Image.Resampling.BICUBIC)


def jpeg(seed: int, size=(160, 120), quality=90) -> bytes:
  out = io.BytesIO()
  photo(seed, size).save(out, 'JPEG', quality=quality)
  return out.getvalue()


def pair(text='a dog in the snow', picture=b'', source='web', score=None):
  return Pair('00000.tar/1', source, text, Picture(picture), score)


def add(tar: tarfile.TarFile, name: str, data: bytes):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def write_tar(path, records):
  """Records are (key, text, picture, score); None leaves a member out."""
  with tarfile.open(path, 'w') as tar:
    for key, text, picture, score in records:
      if picture is not None:
        add(tar, f'{key}.jpg', picture)
      if text is not None:
        add(
          tar, f'{key}.txt', text if isinstance(text, bytes) else text.encode()
        )
      add(tar, f'{key}.json', json.dumps({'similarity': score}).encode())


def write_jsonl(path, records):
  (path.parent / 'pictures').mkdir(exist_ok=True)
  with path.open('w', encoding='utf-8') as file:
    for key, text, picture, _ in records:
      (path.parent / 'pictures' / f'{key}.jpg').write_bytes(picture)
      row = {'id': key, 'text': text, 'image': f'pictures/{key}.jpg'}
      file.write(json.dumps(row) + '\n')


RULES = (
  text_rules.ModelTags(),
  text_rules.Html(),
  text_rules.SpecialTags(),
  text_rules.Emoji(),
  text_rules.Patterns(),
  text_rules.Script(),
  text_rules.Length(),
  image_rules.ClipScore(minimum={'web': 0.3}),
  image_rules.Size(minimum=100),
  image_rules.AspectRatio(),
  image_rules.Readable(),
)
UNIQUE = (
  unique.DuplicatePairs(),
  unique.LongestText(),
  unique.DuplicateTexts(keep=2),
)

# What becomes of each record of the corpus: '' is kept.
FATES = {
  'web/00000.tar/kept': '',
  'web/00000.tar/mended': '',
  'web/00000.tar/small': 'size',
  'web/00000.tar/thin': 'aspect_ratio',
  'web/00000.tar/cut': 'unreadable_image',
  'web/00000.tar/none': 'missing_image',
  'web/00000.tar/silent': 'empty_text',
  'web/00000.tar/latin1': 'invalid_utf8',
  'web/00000.tar/unlike': 'clip_score',
  'web/00000.tar/smile': 'emoji',
  'web/00000.tar/person': 'special_tags',
  'web/00000.tar/tags': 'model_tags',
  'web/00000.tar/word': 'length',
  'web/00000.tar/russian': 'script',
  'web/00001.tar/short': 'longest_text',
  'web/00001.tar/long': '',
  'web/00001.tar/again': 'duplicate_pair',
  'web/00001.tar/same1': '',
  'sbu/lines.jsonl/same2': '',
  'sbu/lines.jsonl/same3': 'duplicate_text',
  'sbu/lines.jsonl/zh': '',
}


def write(folder):
  """Writes two tars and a JSONL file with the records of FATES."""
  (folder / 'sbu').mkdir(parents=True)
  write_tar(
    folder / '00000.tar',
    [
      ('kept', 'a red boat on the lake', jpeg(1), 0.4),
      ('mended', '<b>A &amp; B</b> at https://x.org the sea', jpeg(2), 0.4),
      ('small', 'a tiny grey mouse', jpeg(3, (99, 120)), 0.4),
      ('thin', 'a long grey fence', jpeg(4, (400, 110)), 0.4),
      ('cut', 'a photo cut in half', jpeg(5)[:-800], 0.4),
      ('none', 'no picture at all', None, 0.4),
      ('silent', ' ', jpeg(6), 0.4),
      ('latin1', 'un caf\xe9 noir'.encode('latin-1'), jpeg(7), 0.4),
      ('unlike', 'a text that does not fit', jpeg(8), 0.1),
      ('smile', 'what a nice day \N{GRINNING FACE}', jpeg(9), 0.4),
      ('person', '<PERSON> at the gala', jpeg(10), 0.4),
      ('tags', 'a cat <box>(1,2),(3,4)</box>', jpeg(11), 0.4),
      ('word', 'photo', jpeg(12), 0.4),
      ('russian', '\u043a\u043e\u0442 on a roof top', jpeg(13), 0.4),
    ],
  )
  write_tar(
    folder / '00001.tar',
    [
      ('short', 'the old mill', jpeg(20), 0.4),
      ('long', 'the old mill behind the river', jpeg(20), 0.4),
      ('again', 'The old mill, behind the river!', jpeg(20), 0.4),
      ('same1', 'image not available yet', jpeg(21), 0.4),
    ],
  )
  write_jsonl(
    folder / 'sbu' / 'lines.jsonl',
    [
      ('same2', 'image not available yet', jpeg(22), None),
      ('same3', 'image not available yet', jpeg(23), None),
      ('zh', '\u4e00\u53ea\u9ed1\u732b\u5728\u6811\u4e0a', jpeg(24), None),
    ],
  )


def sources(folder):
  from qwenvl_jax.data.cleaning.inputs import Source

  return (
    Source(name='web', files=str(folder / '*.tar')),
    Source(name='sbu', files=str(folder / 'sbu' / '*.jsonl')),
  )


def job(folder, output, **changes) -> Job:
  settings = {
    'output': str(output),
    'shards': tuple(s for x in sources(folder) for s in x.shards()),
    'rules': RULES,
    'unique': UNIQUE,
    'fingerprints': unique.Fingerprints(),
  }
  return Job(**{**settings, **changes})


def shuffled(items, seed=0):
  items = list(items)
  random.Random(seed).shuffle(items)
  return items
