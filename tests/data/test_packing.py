import io

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax import batch
from qwenvl_jax.data import packing
from qwenvl_jax.data.examples import Sample, encode_sample
from qwenvl_jax.errors import BadRecordError, DataError
from qwenvl_jax.text.chatml import TextSpan
from qwenvl_jax.text.tokenizer import Tokenizer

_TOKENIZER = Tokenizer()
_Q = 4


def _picture(colour):
  encoded = io.BytesIO()
  Image.new('RGB', (20, 10), colour).save(encoded, 'PNG')
  return encoded.getvalue()


_RED = (_picture('red'),)


def _encoded(*branches, images=_RED, record='a/record'):
  prefix = [TextSpan(f'<img>{i}</img>') for i in range(len(images))]
  asked = [(TextSpan(p), TextSpan(a, loss=True)) for p, a in branches]
  sample = Sample(record, tuple(prefix), tuple(asked), images)
  return encode_sample(sample, _TOKENIZER, _Q)


def _row(samples, length=32, slots=2):
  """A row of samples, each cut to it."""
  shape = packing.RowShape(length, slots, 8, _Q)
  cut = [packing.cut(x, length, slots) for x in samples]
  cut = [packing.decoded(x, 8, []) for x in cut]
  return packing.make_row(cut, shape, pad_id=7)


def test_arrays_are_the_fields_of_a_batch():
  arrays = _row([_encoded(('a', ' b'))])
  stacked = {name: array[None] for name, array in arrays.items()}
  row = batch.Batch(**stacked)
  assert row.pixels.shape == (1, 2, 8, 8, 3) and row.pixels.dtype == np.uint8
  for name in ('tokens', 'targets', 'positions', 'segment_ids', 'branch_ids'):
    assert arrays[name].shape == (32,) and arrays[name].dtype == np.int32
  assert arrays['loss_weights'].dtype == np.float32
  assert (arrays['tokens'][8:] == 7).all()
  assert (arrays['segment_ids'] == [1] * 8 + [0] * 24).all()


def test_every_learned_token_is_predicted_from_its_own_context():
  samples = [
    _encoded(('a?', ' yes'), ('b c?', ' no way'), record='x'),
    _encoded(('d?', ' so'), images=(), record='y'),
  ]
  # Prefixes need no loss here; a text's prefix may carry it.
  arrays = _row(samples)
  learned = np.flatnonzero(arrays['loss_weights'])
  for at in learned:
    assert arrays['targets'][at] == arrays['tokens'][at + 1]
    for name in ('segment_ids', 'branch_ids'):
      assert arrays[name][at] == arrays[name][at + 1]
    assert arrays['positions'][at] + 1 == arrays['positions'][at + 1]
  text = _TOKENIZER.decode(arrays['targets'][learned])
  assert text == ' yes no way so'


def test_images_are_where_their_slots_say():
  both = (_picture('red'), _picture('blue'))
  samples = [_encoded(('a', ' b')), _encoded(('c', ' d'), images=both)]
  arrays = _row(samples, slots=4)
  starts = arrays['image_starts']
  assert starts.tolist() == [1, 9, 9 + _Q + 2, batch.NO_IMAGE]
  for start in starts[:3]:
    assert arrays['tokens'][start - 1] == _TOKENIZER.img_start_id
    assert arrays['tokens'][start + _Q] == _TOKENIZER.img_end_id
  assert arrays['pixels'][:3, 0, 0].tolist() == [
    [255, 0, 0],
    [255, 0, 0],
    [0, 0, 255],
  ]


def test_long_text_is_cut_at_its_end():
  row = _row([_encoded(('a', ' b c d e f g h i'))], length=10)
  assert row['segment_ids'].all() and row['loss_weights'].sum() == 3


def test_an_image_is_never_cut():
  for length in (1, 5):
    with pytest.raises(DataError, match='a/record.*sequence_length'):
      _row([_encoded(('a', ' b'))], length=length)
  row = _row([_encoded(('a', ' b'))], length=6)
  assert not row['loss_weights'].any()


def test_no_slot_left():
  with pytest.raises(DataError, match='a/record.*image_slots'):
    _row([_encoded(('a', ' b'), images=_RED * 3)])


def test_a_document_ends_before_what_does_not_fit():
  text = [TextSpan(f' {x}', loss=True) for x in 'abc']
  image = TextSpan('<img>0</img>')
  spans = (text[0], image, text[1], image, text[2])
  sample = Sample('doc', spans, images=_RED * 2, divisible=True)
  encoded = encode_sample(sample, _TOKENIZER, _Q)
  size = _Q + 2
  for length, slots, tokens, images in (
    (32, 2, 3 + 2 * size, 2), (32, 1, 2 + size, 1), (32, 0, 1, 0),
    (2 + 2 * size, 2, 2 + 2 * size, 2), (1 + 2 * size, 2, 2 + size, 1),
    (1 + size, 2, 1 + size, 1), (size, 2, 1, 0),
  ):  # fmt: skip
    kept = packing.cut(encoded, length, slots)
    assert (len(kept), len(kept.images)) == (tokens, images), (length, slots)
    assert len(kept.image_starts) == images
  first = encode_sample(
    Sample('doc', (image, text[0]), images=_RED, divisible=True), _TOKENIZER, _Q
  )
  with pytest.raises(BadRecordError, match='doc: not even its first image'):
    packing.cut(first, size - 1, 1)


def test_fill_keeps_what_fits():
  big, small = _encoded(('a', ' b' * 20)), _encoded(('a', ' b'), images=())
  kept = packing.fill([big, big, small, small], length=31, image_slots=2)
  assert [len(x) for x in kept] == [27, 2, 2]
  kept = packing.fill([big, big, small], length=100, image_slots=1)
  assert [len(x.images) for x in kept] == [1, 0]


def test_a_row_may_hold_no_image_and_have_no_slot():
  arrays = _row([_encoded(('a', ' b'), images=())], slots=0)
  assert arrays['pixels'].shape == (0, 8, 8, 3)
  assert arrays['image_starts'].shape == (0,)


def test_unreadable_images_name_the_record():
  sample = _encoded(('a', ' b'), images=(_picture('red')[:40],))
  with pytest.raises(DataError, match='a/record'):
    _row([sample])
