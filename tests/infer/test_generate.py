import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from qwenvl_jax import batch
from qwenvl_jax.errors import ConfigError, DataError
from qwenvl_jax.infer import generate as generation
from qwenvl_jax.infer.generate import generate, stream
from qwenvl_jax.model.cache import KVCache

CASES = ('text', 'one_image', 'cross', 'two_images')


@pytest.fixture(scope='module')
def one(golden):
  """Continues the golden `text` prompt."""
  ids, _ = golden.prompt('text')

  def run(**settings):
    settings = {'max_new_tokens': 36} | settings
    return generate(golden.model, golden.params, [ids], **settings)[0]

  return run


def test_rows_of_one_batch_match_pytorch_alone(golden):
  """The goldens are made one by one: padding and neighbours change nothing.

  The rows differ in length, number of images, NTK frequencies and LogN.
  """
  prompts, images = zip(*map(golden.prompt, CASES), strict=True)
  answers = generate(
    golden.model, golden.params, prompts, images, max_new_tokens=48
  )
  for case, ids in zip(CASES, answers, strict=True):
    expected = golden.new(case)
    assert ids[: len(expected)] == expected, case


@pytest.mark.parametrize('case', ['text', 'one_image'])
def test_streaming_gives_the_same_ids(golden, case):
  ids, images = golden.prompt(case)
  pieces = stream(golden.model, golden.params, ids, images, max_new_tokens=48)
  assert list(pieces) == golden.new(case)


def test_prefill_and_decoding_equal_the_full_forward(golden):
  """Also a prompt read in two parts, each row after padding of its own."""
  config, lengths = golden.model.config, np.array([9, 14])
  tokens = np.random.default_rng(0).integers(0, 499, (2, 20))
  apply = jax.jit(golden.model.apply, static_argnames=('inference', 'method'))
  full = apply(
    {'params': golden.params}, batch.text_batch(tokens), inference=True
  )
  cache = KVCache.create(config, 2, 24, lengths)
  mask = np.arange(14) >= 14 - lengths[:, None]
  padded = np.stack(
    [np.roll(tokens[i, :14], 14 - n) for i, n in enumerate(lengths)]
  )
  whole = batch.text_batch(padded, mask)
  for columns in (slice(0, 10), slice(10, 14)):
    part = dataclasses.replace(
      whole,
      **{
        name: getattr(whole, name)[:, columns]
        for name in (
          'tokens',
          'targets',
          'positions',
          'segment_ids',
          'branch_ids',
          'loss_weights',
        )
      },
    )
    logits, cache = apply(
      {'params': golden.params}, part, cache, method='extend'
    )
  rows = np.arange(2)
  for step in range(5):
    np.testing.assert_allclose(
      logits, full[rows, lengths - 1 + step], atol=2e-5
    )
    position = lengths + step
    logits, cache = apply(
      {'params': golden.params},
      generation.token_batch(
        tokens[rows, position].astype(np.int32), position.astype(np.int32)
      ),
      cache,
      method='extend',
    )


def test_answers_end_before_a_stop_id(golden, one):
  free = one()
  stop = free[5]
  cut = free[: free.index(stop)]
  assert one(stop_ids=(stop,)) == cut
  assert one(stop_ids=(400, 401, stop)) == cut
  ids, _ = golden.prompt('text')
  streamed = stream(
    golden.model, golden.params, ids, max_new_tokens=36, stop_ids=(stop,)
  )
  assert list(streamed) == cut


def test_min_new_tokens_hold_the_stop_back(one):
  free = one()
  longer = one(stop_ids=(free[0],), min_new_tokens=4)
  assert len(longer) >= 4
  assert free[0] not in longer


def test_sampling_is_repeatable_and_independent_of_the_batch(golden, one):
  settings = {'temperature': 1.5, 'key': jax.random.key(1)}
  drawn = one(**settings)
  assert drawn == one(**settings)
  assert drawn != one(temperature=1.5, key=jax.random.key(2)) != one()
  # A tiny top_p leaves only the best token.
  assert one(temperature=1.5, top_p=1e-6) == one(temperature=1.5, top_k=1)
  assert one(temperature=1.5, top_k=1) == one()

  ids, _ = golden.prompt('text')
  model, params = golden.model, golden.params
  rows = generate(
    model, params, [ids, ids[:3], ids], max_new_tokens=36, **settings
  )
  assert rows[0] == drawn
  assert rows[2] != drawn
  streamed = stream(model, params, ids, max_new_tokens=36, **settings)
  assert list(streamed) == drawn


def test_few_programs_are_compiled(golden):
  """Lengths, rows and settings change; shapes do not."""

  def run(lengths, **settings):
    prompts = [[3] * n for n in lengths]
    return generate(golden.model, golden.params, prompts, **settings)

  run([5, 9, 30], max_new_tokens=40)
  before = generation._prefill._cache_size(), generation._decode._cache_size()
  run([7, 20, 1], max_new_tokens=33, stop_ids=(3,), min_new_tokens=1)
  assert before == (
    generation._prefill._cache_size(),
    generation._decode._cache_size(),
  )


def test_no_prompts_no_answers(golden):
  assert generate(golden.model, golden.params, [], max_new_tokens=3) == []


def test_bad_input_names_the_row(golden):
  def run(prompts, images=None, max_new_tokens=3, **settings):
    return generate(
      golden.model,
      golden.params,
      prompts,
      images,
      max_new_tokens=max_new_tokens,
      **settings,
    )

  ids, pixels = golden.prompt('one_image')
  with pytest.raises(DataError, match='row 1: 1 <img> spans .* 0 images'):
    run([[1, 2], ids], None)
  with pytest.raises(DataError, match='row 0: the span of image 1'):
    run([ids[:200]], [pixels])
  with pytest.raises(DataError, match='2 prompts, but images for 1'):
    run([[1], [2]], [None])
  limit = golden.model.config.decoder.max_position_embeddings
  with pytest.raises(DataError, match='row 1: 3 prompt tokens'):
    run([[1], [1, 2, 3]], max_new_tokens=limit - 2)
  with pytest.raises(ConfigError, match='max_new_tokens=0'):
    run([[1]], max_new_tokens=0)
  with pytest.raises(ConfigError, match='temperature=-1'):
    run([[1]], temperature=-1)


SPLIT = """
import sys
sys.path.insert(0, {tests!r})
import golden
import jax, numpy as np
import qwenvl_jax
from qwenvl_jax.sharding import MeshConfig, make_mesh, use_mesh

found = golden.expected()
row = found['generate/one_image/ids'].reshape(-1)
ids, pixels = row.tolist(), golden.spans(row)[1]
alone = qwenvl_jax.load(golden.FOLDER, dtype='float32').logits([ids], pixels)
# One row on a mesh that splits a batch four ways, and on one that splits heads.
for mesh in MeshConfig(fsdp=4), MeshConfig(fsdp=1, tensor=4):
  with use_mesh(make_mesh(mesh)):
    qwen = qwenvl_jax.load(golden.FOLDER, dtype='float32')
    kernel = qwen.params['decoder']['blocks']['mlp']['down']['kernel']
    assert not kernel.sharding.is_fully_replicated
    (new,) = qwen.generate([ids], pixels, max_new_tokens=48)
    assert new == found['generate/one_image/new'].reshape(-1).tolist(), mesh
    logits = qwen.logits([ids], pixels)
    np.testing.assert_allclose(logits, alone, atol=golden.ATOL)
"""


def test_a_row_may_run_on_several_devices(run_on_devices):
  tests = str(pathlib.Path(__file__).parents[1])
  run_on_devices(4, SPLIT.format(tests=tests))
