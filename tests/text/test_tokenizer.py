"""The tokenizer gives the released ids, and survives what a model writes."""

import base64
import hashlib
import json
import pathlib
import pickle
import random
import unicodedata

import numpy as np
import pytest

from qwenvl_jax.errors import DataError
from qwenvl_jax.text.special_tokens import SPECIAL_TOKENS
from qwenvl_jax.text.tokenizer import Tokenizer, image_paths, normalize

GOLDENS = pathlib.Path(__file__).parents[1] / 'goldens' / 'tokenizer.json'
GOLDEN = json.loads(GOLDENS.read_text(encoding='utf-8'))
RELEASED_SHA256 = (
  'b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186'
)
# What no vocabulary has merges for in full.
ODD_TEXTS = (
  '🦄🚀 👩‍👩‍👧 ',
  'العربية हिन्दी ไทย',
  '\x00\x01\x7f\r\n\t  \u3000',
  'ÿþ 𝕏𝕐 \ue000',
)


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer()


def test_special_ids_are_the_released_ones(tokenizer):
  assert tokenizer.vocab_size == GOLDEN['n_vocab']
  for token, expected in GOLDEN['special'].items():
    assert tokenizer.special[token] == expected
    if token != '<img>':  # alone it is an error, see below
      assert tokenizer.encode(token * 2) == [expected] * 2
  named = {
    'eod_id': '<|endoftext|>',
    'im_start_id': '<|im_start|>',
    'im_end_id': '<|im_end|>',
    'ref_start_id': '<ref>',
    'ref_end_id': '</ref>',
    'box_start_id': '<box>',
    'box_end_id': '</box>',
    'quad_start_id': '<quad>',
    'quad_end_id': '</quad>',
    'img_start_id': '<img>',
    'img_end_id': '</img>',
    'img_pad_id': '<imgpad>',
  }
  for name, token in named.items():
    assert getattr(tokenizer, name) == GOLDEN['special'][token]


@pytest.mark.parametrize('case', GOLDEN['encode'], ids=lambda c: c['text'][:20])
def test_encode_and_decode_as_released(tokenizer, case):
  assert tokenizer.encode(case['text']) == case['ids']
  assert tokenizer.decode(case['ids']) == case['decoded']
  assert tokenizer.decode(np.array(case['ids'], np.int32)) == case['decoded']


@pytest.mark.parametrize('image_tokens', [1, 16, 64, 400])
def test_image_span_has_the_asked_length_whatever_the_path(
  tokenizer, image_tokens
):
  for path in ('', 'a.png', 'long/' * 200 + 'x.png', '图' * 300):
    ids = tokenizer.encode(f'x<img>{path}</img>y', image_tokens)
    assert len(ids) == image_tokens + 4
    (start,) = tokenizer.image_starts(ids, image_tokens)
    assert ids[start - 1] == tokenizer.img_start_id
    assert ids[start + image_tokens] == tokenizer.img_end_id
    kept = tokenizer.decode(ids)[len('x<img>') : -len('</img>y')]
    # Cut between characters, so nothing is garbled.
    assert path.startswith(kept)
    assert len(path.encode()) <= image_tokens or kept or image_tokens < 3


def test_ordinary_text_holds_no_special_token(tokenizer):
  text = '<|im_end|><img>a</img><box>'
  ids = tokenizer.encode_ordinary(text)
  assert max(ids) < len(tokenizer.vocabulary)
  assert tokenizer.decode(ids) == text
  some = tokenizer.encode(text, allowed_special=['<box>'])
  assert some[-1] == tokenizer.box_start_id
  assert some[:-1] == tokenizer.encode_ordinary('<|im_end|><img>a</img>')


@pytest.mark.parametrize('text', ['<img>a.png', 'x<img>a<img>b</img>'])
def test_unclosed_image_is_an_error_that_says_what_to_write(tokenizer, text):
  with pytest.raises(DataError, match='unclosed <img>.*write <img>PATH</img>'):
    tokenizer.encode(text)


def test_decode_never_fails(tokenizer):
  rng = random.Random(0)
  start, end, pad = (
    tokenizer.img_start_id,
    tokenizer.img_end_id,
    tokenizer.img_pad_id,
  )
  likely = [start, end, pad, 97, 255, 151935, -100, 151643]
  for _ in range(300):
    ids = rng.choices(likely, k=rng.randrange(12))
    ids += rng.choices(range(-5, 152000), k=4)
    assert isinstance(tokenizer.decode(ids), str)
  assert tokenizer.decode([start, 9707]) == '<img>Hello'
  assert tokenizer.decode([start, 9707, end]) == '<img>Hello</img>'
  assert tokenizer.decode([151935, 9707, -1]) == '\ufffdHello\ufffd'
  assert tokenizer.decode([151644, 9707, 151645], skip_special=True) == 'Hello'


def test_characters_split_over_tokens_join_as_bytes(tokenizer):
  ids = tokenizer.encode(' 🦄')
  assert len(ids) > 1
  assert '\ufffd' in tokenizer.decode(ids[:1])
  parts = [tokenizer.decode_bytes([token]) for token in ids]
  assert b''.join(parts).decode() == ' 🦄'


def test_image_starts_names_the_record_when_a_span_is_cut(tokenizer):
  ids = tokenizer.encode('<img>a</img>hi<img>b</img>', 16)
  assert tokenizer.image_starts(ids, 16) == [1, 20]
  for cut in (1, 10, 17):
    with pytest.raises(DataError, match='caption 7: image 2 needs 18 tokens'):
      tokenizer.image_starts(ids[:-cut], 16, 'caption 7')
  with pytest.raises(DataError, match='check image_tokens'):
    tokenizer.image_starts(ids, 64)


def test_image_paths_keep_their_own_spelling():
  # Not normalized: file names may be decomposed.
  text = 'a<img>e\u0301.png</img>\n<img></img><img>open'
  assert image_paths(text) == ['e\u0301.png', '']


def test_saving_the_default_gives_the_released_file(tokenizer, tmp_path):
  path = tmp_path / 'qwen.tiktoken'
  tokenizer.save(path)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  assert digest == RELEASED_SHA256
  assert list(tmp_path.iterdir()) == [path]
  assert Tokenizer(path) == tokenizer
  with pytest.raises(DataError, match='cannot write.*folder exists'):
    tokenizer.save(tmp_path / 'nowhere' / 'x.tiktoken')


def test_in_a_bucket(bucket):
  small = Tokenizer.from_ranks([bytes([i]) for i in range(256)])
  url = f'{bucket.url}/small.tiktoken'
  small.save(url)
  assert Tokenizer(url) == small
  with pytest.raises(DataError, match='cannot read the vocabulary gs://.*none'):
    Tokenizer(f'{bucket.url}/none')


def test_default_is_read_once(tokenizer):
  assert Tokenizer()._bpe is tokenizer._bpe


SCENES = [
  'Generate the caption in English: a red apple left of two cats.',
  '图中是一只拉布拉多犬。生成中文描述：红色的苹果在两只猫的左边。',
  'OCR with grounding: <ref>It is managed</ref><quad>(568,121),(625,131),'
  '(624,182),(567,172)</quad><|endoftext|>',
  "<img>scenes/0.png</img>  How many？   3\n\n\n\tDon't I'LL  ",
  '日本語テキスト 한국어 antidisestablishmentarianism',
]


def test_subset_splits_its_texts_as_the_full_vocabulary(tokenizer):
  small = tokenizer.subset(SCENES)
  assert small.vocab_size < 256 + 217 + 400
  assert small.vocabulary[:256] == tokenizer.vocabulary[:256]
  for text in SCENES:
    full = tokenizer.encode(text, 16)
    ours = small.encode(text, 16)
    pieces = [tokenizer.decode_bytes([token]) for token in full]
    assert [small.decode_bytes([token]) for token in ours] == pieces


def test_subset_is_closed_under_merging(tokenizer):
  # Every kept token arises from two kept ones, so that other BPE
  # implementations, which merge step by step, agree.
  small = tokenizer.subset(SCENES)
  kept = set(small.vocabulary)
  for token in kept:
    splits = ((token[:i], token[i:]) for i in range(1, len(token)))
    assert len(token) == 1 or any(a in kept and b in kept for a, b in splits)


def test_subset_encodes_any_other_text(tokenizer, tmp_path):
  small = tokenizer.subset(SCENES)
  path = tmp_path / 'small.tiktoken'
  small.save(path)
  loaded = Tokenizer(path)
  copied = pickle.loads(pickle.dumps(small))
  rng = random.Random(1)
  noise = ''.join(chr(rng.randrange(0x20, 0xD000)) for _ in range(400))
  for text in (*ODD_TEXTS, *SCENES, 'the quick brown fox'):
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert loaded.encode(text) == copied.encode(text) == ids
    assert max(ids) < small.vocab_size
  # Noise is not normalized text: once normalized, it stays.
  normal = small.decode(small.encode(noise))
  assert small.decode(small.encode(normal)) == normal
  assert normal == tokenizer.decode(tokenizer.encode(noise))
  assert loaded == copied == small != tokenizer


def test_first_ranks_are_a_vocabulary_too(tokenizer):
  small = Tokenizer.from_ranks(tokenizer.vocabulary[:1024])
  assert small.eod_id == 1024
  assert small.vocab_size == 1024 + len(SPECIAL_TOKENS)
  text = '<img>a.png</img>你好 Hello<|im_end|>'
  assert small.decode(small.encode(text, 16)) == text


def _line(token: bytes, rank: int) -> bytes:
  return base64.b64encode(token) + b' %d\n' % rank


ALL_BYTES = b''.join(_line(bytes([b]), b) for b in range(256))


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"json": true}', 'line 1: .*expected a .tiktoken'),
    (ALL_BYTES + b'!!!! 256\n', 'line 257'),
    (ALL_BYTES + _line(b'ab', 300), 'line 257: ranks do not count'),
    (ALL_BYTES[:900], 'line|lacks'),
    (ALL_BYTES + _line(b'a', 256), 'line 257: the token of line 98 .*twice'),
    (
      ALL_BYTES + _line(b'ab', 255),
      'line 257: ranks do not .* a line is double',
    ),
    (ALL_BYTES + _line(b'ab', 257), 'line 257: ranks do not .*missing'),
    (ALL_BYTES + b'YWI=\n', 'line 257: no rank'),
    (ALL_BYTES + b'YWI= 2_56\n', 'line 257: no rank'),
    (ALL_BYTES + b'YWI=  256\n', 'line 257: no rank'),
    (ALL_BYTES + b'YWJ= 256\n', 'line 257: no base64'),
    (ALL_BYTES + b'YW*= 256\n', 'line 257: no base64'),
    (ALL_BYTES + b' 256\n', 'line 257: an empty token'),
    (ALL_BYTES + b'\n' + _line(b'ab', 256), 'line 257: no rank'),
    (b'', 'lacks 256'),
  ],
)
def test_damaged_vocabulary_is_refused_by_name(tmp_path, content, message):
  path = tmp_path / 'bad.tiktoken'
  path.write_bytes(content)
  with pytest.raises(DataError, match=message) as error:
    Tokenizer(path)
  assert 'bad.tiktoken' in str(error.value)


def test_missing_vocabulary_is_refused_by_name(tmp_path):
  with pytest.raises(DataError, match='nothing.tiktoken'):
    Tokenizer(tmp_path / 'nothing.tiktoken')
  with pytest.raises(DataError, match=r'\.tiktoken'):
    Tokenizer(tmp_path)


def test_a_tokenizer_knows_its_models_number_of_queries():
  tokenizer = Tokenizer(image_tokens=36)
  spans = [
    len(x.encode('<img>a.jpg</img>'))
    for x in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), Tokenizer())
  ]
  assert spans == [38, 38, 258]
  assert len(tokenizer.encode('<img>a.jpg</img>', 64)) == 66


def test_what_people_repeat_takes_no_more_than_its_length(tokenizer):
  """Each of these took the square of it: minutes, or days."""
  marks = 'e' + '\u0301\u0323' * 500_000
  assert 256 < len(tokenizer.encode(marks)) < 1024
  spans = '<img>a</img> word ' * 10_000
  ids = np.array(tokenizer.encode(spans, 1))
  assert (ids == tokenizer.img_start_id).sum() == 10_000
  assert image_paths('<img>' * 200_000) == []
  assert image_paths('<img>a</img>' * 100_000) == ['a'] * 100_000


def test_normalization_is_nfc_but_for_endless_marks():
  for text in ('', 'e\u0301', '\u1100\u1161', 'x' * 300 + 'e\u0323\u0301'):
    assert normalize(text) == unicodedata.normalize('NFC', text)
  zalgo = ''.join(c + '\u0301\u0323\u0334' * 20 for c in 'hello' * 60)
  assert normalize(zalgo) == unicodedata.normalize('NFC', zalgo)
  text = 'e' + '\u0323' * 1000 + 'f'
  assert normalize(text) == unicodedata.normalize('NFC', text[:257] + 'f')


def test_special_tokens_of_every_kind_are_parsed_as_tiktoken_does(tokenizer):
  rng = random.Random(0)
  known = list(tokenizer.special)
  parts = [*known, ' a', 'b c', '<b>', '<', '>', '<|', '|>', '\n', 'é', '</']
  for allowed in ('all', known[:3], known[-9:-3], ['<|extra_7|>'], []):
    for _ in range(200):
      text = ''.join(rng.choices(parts, k=8))
      if '<img>' in text or '</img>' in text:
        continue
      expected = tokenizer._bpe.encoding.encode(
        text,
        allowed_special=set(known if allowed == 'all' else allowed),
        disallowed_special=(),
      )
      assert tokenizer.encode(text, 4, allowed) == expected, text
