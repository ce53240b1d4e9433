"""Cleans a made corpus of known defects and compares with the truth.

Three data sets in the three formats are composed, with known shares of every
defect that the rules of configs/clean.gin are there for; the pipeline runs as
`qwenvl-data clean` runs it; then every record's fate is held against what was
done to it. Prints a table and pairs per second.

  launch/in_env.sh beam python benchmarks/cleaning_report.py --n 6000
"""

import argparse
import collections
import dataclasses
import io
import json
import pathlib
import random
import tarfile
import tempfile
import time

import pyarrow
import pyarrow.parquet
from PIL import Image

from qwenvl_jax import configuration
from qwenvl_jax.data import storage, things
from qwenvl_jax.data.builders import compose
from qwenvl_jax.data.cleaning import pipeline, shards
from qwenvl_jax.data.cleaning.inputs import Source

STYLE = compose.Style(side=224, sprite=(42, 112), lattice=1, text=0.0)

# Defect -> share of the records.
SHARES = {
  'model_tags': 0.01,
  'special_tags': 0.02,
  'emoji': 0.03,
  'script': 0.04,
  'too_short': 0.03,
  'too_long': 0.01,
  'language': 0.04,
  'clip_score': 0.06,
  'size': 0.04,
  'aspect_ratio': 0.03,
  'truncated': 0.02,
  'not_a_picture': 0.01,
  'no_image': 0.01,
  'no_text': 0.01,
  'text_encoding': 0.005,
  'same_pair': 0.03,
  'resized_pair': 0.03,
  'shorter_text': 0.02,
  'boilerplate': 0.02,
  'html': 0.05,
  'patterns': 0.05,
}
# Where the reason has another name than the defect.
REASONS = {
  'no_image': 'missing_image',
  'no_text': 'empty_text',
  'text_encoding': 'invalid_utf8',
  'too_short': 'length',
  'too_long': 'length',
  'truncated': 'unreadable_image',
  'not_a_picture': 'unreadable_image',
  'same_pair': 'duplicate_pair',
  'resized_pair': 'duplicate_pair',
  'shorter_text': 'longest_text',
  'boilerplate': 'duplicate_text',
}
# These are mended, not dropped.
MENDED = ('html', 'patterns')

FOREIGN = (
  'Ein {0} steht auf einer Wiese vor dem alten Haus',
  'Le {0} est assis sur la chaise devant la maison',
  'El {0} está en la mesa de la cocina con las flores',
  'Il {0} si trova sulla strada davanti alla chiesa',
  'Een {0} ligt op het gras naast de rode fiets',
)
SCRIPTS = ('{0} на зелёной траве', '{0}は木の上にいます', '{0} في الحديقة')
BOILERPLATE = ('Product image is not available', 'Click to see larger picture')


@dataclasses.dataclass
class Made:
  """A record and what is wrong with it ('' if nothing).

  `repeats` is the number of the record that it repeats.
  """

  defect: str
  text: str | bytes
  picture: bytes | None
  score: float | None
  source: str
  repeats: int | None = None


def picture(rng: random.Random, size=None) -> bytes:
  drawn = compose.compose(rng, STYLE).image
  if size:
    drawn = drawn.resize(size)
  return encoded(drawn, rng.randint(75, 95))


def encoded(drawn: Image.Image, quality: int) -> bytes:
  out = io.BytesIO()
  drawn.save(out, 'JPEG', quality=quality)
  return out.getvalue()


def caption(rng: random.Random, number: int) -> str:
  thing = rng.choice(things.THINGS)
  colour = rng.choice(things.COLOURS)
  if rng.random() < 0.25:
    return f'一只{thing.zh}在{colour.zh}的背景上，编号{number}'
  phrase = rng.choice(
    (
      'A {0} on a {1} background, picture {2}',
      'Photo of the {0} in front of a {1} wall in room {2}',
      'the {0} with a {1} cloth, lot {2}',
    )
  )
  return phrase.format(thing.en, colour.en, number)


def make(rng: random.Random, number: int, earlier: dict[int, Made]) -> Made:
  """One record; `earlier` are sound ones that it may repeat."""
  source = rng.choice(('laion_en', 'coyo', 'cc12m'))
  defect = rng.choices(
    ['', *SHARES], [1 - sum(SHARES.values()), *SHARES.values()]
  )[0]
  # SBU and CC12M have no scores, and JSON has no bytes that are not UTF-8.
  if defect in ('clip_score', 'text_encoding'):
    source = 'laion_en'
  text, thing = caption(rng, number), rng.choice(things.THINGS)
  made = Made(defect, text, None, rng.uniform(0.31, 0.4), source)
  if defect in ('same_pair', 'resized_pair', 'shorter_text') and earlier:
    return repeat(rng, made, *rng.choice(list(earlier.items())))
  size = None
  if defect == 'size':
    size = rng.choice(((64, 64), (96, 140), (99, 99), (16, 20)))
  if defect == 'aspect_ratio':
    size = rng.choice(((700, 110), (120, 480), (1000, 200)))
  made.picture = picture(rng, size)
  if defect == 'truncated':
    made.picture = made.picture[: len(made.picture) * 2 // 3]
  elif defect == 'not_a_picture':
    made.picture = rng.choice(
      (b'<html>404 Not Found</html>', rng.randbytes(99))
    )
  elif defect == 'no_image':
    made.picture = None
  elif defect == 'clip_score':
    made.score = rng.uniform(0.1, 0.29)
  made.text = {
    'model_tags': f'{text} <|im_start|>system',
    'special_tags': f'<PERSON> with {text}',
    'emoji': f'{text} {rng.choice("😀🔥❤🎉")}',
    'script': rng.choice(SCRIPTS).format(thing.en),
    'too_short': rng.choice(('photo', 'IMG_2041', thing.en, 'the end')),
    'too_long': ' '.join([text] * 30),
    'language': rng.choice(FOREIGN).format(thing.en),
    'no_text': rng.choice(('', '   ')),
    'text_encoding': b'caf\xe9 ' + text.encode('utf-8', 'ignore'),
    'boilerplate': rng.choice(BOILERPLATE),
    'html': f'<p>{text.replace(" ", "&nbsp;", 1)}</p><br/>',
    'patterns': f'{text} - - - https://example.org/{number}.jpg !!!!',
  }.get(defect, text)
  return made


def repeat(rng, made: Made, number: int, original: Made) -> Made:
  made.text, made.picture = original.text, original.picture
  made.repeats = number
  if made.defect == 'shorter_text':
    made.text = ' '.join(original.text.split()[:4])
  if made.defect == 'resized_pair':
    drawn = Image.open(io.BytesIO(original.picture))
    drawn = drawn.resize((160, 160), Image.Resampling.LANCZOS)
    made.picture = encoded(drawn, rng.randint(40, 90))
  return made


def write(folder: pathlib.Path, corpus: list[Made]) -> list[Source]:
  """Writes shards of 500; ids are the records' numbers."""
  by_source = collections.defaultdict(list)
  for number, made in enumerate(corpus):
    by_source[made.source].append((f'{number:08d}', made))
  for source, records in by_source.items():
    (folder / source / 'pictures').mkdir(parents=True)
    for start in range(0, len(records), 500):
      name = f'{start // 500:05d}'
      part = records[start : start + 500]
      WRITERS[source](folder / source, name, part)
  return [
    Source(name='laion_en', files=str(folder / 'laion_en/*.tar')),
    Source(name='coyo', files=str(folder / 'coyo/*.parquet')),
    Source(name='cc12m', files=str(folder / 'cc12m/*.jsonl')),
  ]


def write_tar(folder, name, records):
  with tarfile.open(folder / f'{name}.tar', 'w') as tar:
    for key, made in records:
      text = made.text if isinstance(made.text, bytes) else made.text.encode()
      members = {'txt': text, 'json': json.dumps({'similarity': made.score})}
      members['json'] = members['json'].encode()
      if made.picture is not None:
        members['jpg'] = made.picture
      for field, data in members.items():
        info = tarfile.TarInfo(f'{key}.{field}')
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def write_parquet(folder, name, records):
  rows = [
    {
      'key': key,
      'caption': made.text,
      'jpg': made.picture,
      'clip_similarity_vitb32': made.score,
    }
    for key, made in records
  ]
  pyarrow.parquet.write_table(
    pyarrow.Table.from_pylist(rows), folder / f'{name}.parquet'
  )


def write_jsonl(folder, name, records):
  with (folder / f'{name}.jsonl').open('w', encoding='utf-8') as file:
    for key, made in records:
      row = {'id': key, 'caption': made.text, 'image': f'pictures/{key}.jpg'}
      if made.picture is not None:
        (folder / row['image']).write_bytes(made.picture)
      file.write(json.dumps(row) + '\n')


WRITERS = {
  'laion_en': write_tar,
  'coyo': write_parquet,
  'cc12m': write_jsonl,
}


def originals_first(corpus: list[Made], kept: set[int]) -> set[int]:
  """As if of alike records always the original were kept, not a repetition.

  Which is kept depends on the order of sources, and is not what is measured.
  """
  kept = set(kept)
  # Of a resized repetition it may not be known that it is one: last.
  order = sorted(
    range(len(corpus)), key=lambda i: corpus[i].defect == 'resized_pair'
  )
  for number in order:
    made = corpus[number]
    if number in kept and made.repeats is not None and made.repeats not in kept:
      kept.remove(number)
      kept.add(made.repeats)
  return kept


def compare(corpus: list[Made], job, tally) -> bool:
  """Prints the table; whether all is as it should be, but for resized ones."""
  kept = set()
  for shard in range(len(job.shards)):
    for data in storage.read_records(job.finished.path(shard)):
      kept.add(int(shards.decode(data).id.rpartition('/')[2]))
  kept = originals_first(corpus, kept)
  allowed = next(x.keep for x in job.unique if x.name == 'duplicate_text')
  truth, caught, left = (collections.Counter() for _ in range(3))
  boilerplate = collections.Counter()
  for number, made in enumerate(corpus):
    truth[made.defect] += 1
    if made.defect == 'boilerplate':
      boilerplate[made.text] += 1
    (left if number in kept else caught)[made.defect] += 1
  print(f'{"defect":16}{"records":>9}{"dropped":>9}{"kept":>9}  should be')
  good = True
  for defect in ('', *SHARES):
    keep = truth[defect] if defect in ('', *MENDED) else 0
    if defect == 'boilerplate':
      keep = sum(min(n, allowed) for n in boilerplate.values())
    right = left[defect] == keep
    # Looks are compared by a key that another size may change.
    good &= right or defect == 'resized_pair'
    print(
      f'{defect or "sound":16}{truth[defect]:>9,}{caught[defect]:>9,}'
      f'{left[defect]:>9,}  {keep:,} kept{"" if right else "  <-- missed"}'
    )
  wanted = collections.Counter(
    {REASONS.get(d, d): 0 for d in SHARES if d not in MENDED}
  )
  for defect, count in caught.items():
    wanted[REASONS.get(defect, defect or 'sound')] += count
  counted = collections.Counter()
  for (_, reason), count in tally.outcomes.items():
    counted[reason or 'kept'] += count
  print(f'\n{"reason":18}{"counted":>9}{"dropped for it by the truth":>30}')
  for reason in sorted({*wanted, *counted} - {'kept', 'sound', *MENDED}):
    print(f'{reason:18}{counted[reason]:>9,}{wanted[reason]:>30,}')
  return good


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--n', type=int, default=6000, help='records')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', help='keep corpus and result here')
  flags = parser.parse_args()
  rng = random.Random(flags.seed)
  corpus, sound = [], {}
  for number in range(flags.n):
    made = make(rng, number, sound)
    corpus.append(made)
    if not made.defect and ' ' in made.text:
      sound[number] = made
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(flags.output or scratch)
    sources = write(folder, corpus)
    configuration.load(['clean.gin'])
    configured = configuration.build(pipeline.Cleaning)
    job = dataclasses.replace(
      configured, sources=sources, output=str(folder / 'cleaned')
    ).job()
    start = time.perf_counter()
    tally = pipeline.run(job)
    seconds = time.perf_counter() - start
    good = compare(corpus, job, tally)
    kept = sum(n for (_, reason), n in tally.outcomes.items() if not reason)
    print(
      f'\n{len(corpus):,} records in {len(job.shards)} shards, {kept:,} kept; '
      f'{len(corpus) / seconds:,.0f} records a second, one process'
    )
  return 0 if good else 1


if __name__ == '__main__':
  raise SystemExit(main())
