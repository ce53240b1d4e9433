import io

import corpus
from PIL import Image

from qwenvl_jax.data.cleaning import unique


def entry(image, text, length, shard, index):
  return unique.Entry(image, text, length, shard, index)


def alike(rule, one, other, text=b'text'):
  """Whether a rule sees two looks as one picture."""
  one, other = (entry(look, text, 1, 0, 0) for look in (one, other))
  return rule.key(one) == rule.key(other)


def test_a_look_survives_another_size_and_compression():
  fine = coarse = 0
  for seed in range(20):
    out = io.BytesIO()
    small = corpus.photo(seed).resize((120, 90), Image.Resampling.LANCZOS)
    small.save(out, 'JPEG', quality=60)
    looks = (
      unique.perceptual_hash(Image.open(out)),
      unique.perceptual_hash(corpus.photo(seed)),
    )
    fine += alike(unique.LongestText(), *looks)
    # Under the same text, less has to be alike.
    coarse += alike(unique.DuplicatePairs(), *looks)
  assert fine >= 15 and coarse >= 19


def test_looks_of_different_pictures_differ():
  looks = [unique.perceptual_hash(corpus.photo(seed)) for seed in range(200)]
  for rule in (unique.LongestText(), unique.DuplicatePairs()):
    assert len({rule.key(entry(x, b'text', 1, 0, 0)) for x in looks}) == 200


def test_plain_pictures_are_told_apart_by_their_bytes():
  white, grey = (Image.new('RGB', (200, 200), c) for c in ('white', '#eee'))
  assert unique.perceptual_hash(white) is None
  keys = []
  for picture in (white, grey):
    out = io.BytesIO()
    picture.save(out, 'PNG')
    keys.append(unique.Fingerprints()(corpus.pair(picture=out.getvalue()))[0])
  assert keys[0] != keys[1]


def test_text_keys_ignore_case_signs_and_width():
  assert unique.text_key('A Cat, on  a mat!') == unique.text_key(
    'a cat on a mat'
  )
  assert unique.text_key('ＡＢＣ') == unique.text_key('abc')
  assert unique.text_key('a cat') != unique.text_key('a dog')
  assert unique.text_key('红色') != unique.text_key('蓝色')


def test_bytes_as_fingerprints():
  one = corpus.pair(picture=corpus.jpeg(1, quality=90))
  other = corpus.pair(picture=corpus.jpeg(1, quality=80))
  exact = unique.Fingerprints(images='bytes')
  assert exact(one)[0] != exact(other)[0]
  assert unique.Fingerprints()(one)[0] == unique.Fingerprints()(other)[0]


def test_the_best_of_parts_are_the_best_of_all():
  entries = [entry(b'i', b't', n % 7, n % 3, n) for n in range(30)]
  for rule in (unique.LongestText(), unique.DuplicateTexts(keep=4)):
    whole = unique.best(rule, entries)
    parts = [unique.best(rule, part) for part in (entries[:9], entries[9:], [])]
    merged = unique.best(rule, corpus.shuffled(x for p in parts for x in p))
    assert merged == whole and len(whole) == rule.keep
  longest = unique.best(unique.LongestText(), entries)[0]
  assert longest.length == 6 and longest.place == (0, 6)
