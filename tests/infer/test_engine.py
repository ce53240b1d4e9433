"""The engine's programs: what they compute, in how much memory, how many."""

import dataclasses

import golden as golden_files
import jax
import numpy as np
import pytest
import toy

from qwenvl_jax.errors import ConfigError
from qwenvl_jax.infer.engine import Engine, EngineConfig
from qwenvl_jax.infer.generate import generate
from qwenvl_jax.infer.image_bank import ImageBank
from qwenvl_jax.infer.reading import Reading
from qwenvl_jax.infer.request import Request
from qwenvl_jax.infer.sampling import Sampling
from qwenvl_jax.infer.scheduler import Load, Scheduler
from qwenvl_jax.infer.score import score

CONFIG = toy.config(layers=2)

# (chunk, max_len), also where a chunk is no bucket or more than there is room.
SIZES = [(512, 3000), (128, 1024), (640, 2000), (512, 100), (384, 4096)]


def sizes(chunk, max_len):
  """An engine that only knows its sizes."""
  return Engine(
    toy.config(), {}, EngineConfig(slots=2, chunk=chunk, max_len=max_len)
  )


@pytest.mark.parametrize('chunk, max_len', SIZES)
def test_pieces_cover_every_prompt_and_fit_its_prefix(chunk, max_len):
  engine = sizes(chunk, max_len)
  largest = engine.prefix_size(max_len)
  for length in range(1, max_len + 1):
    pieces, size = engine.pieces(length), engine.prefix_size(length)
    assert pieces[0].start == 0
    assert pieces[-1].stop == length
    for before, after in zip(pieces, pieces[1:]):
      assert before.stop == after.start
    for piece in pieces:
      assert 0 < piece.stop - piece.start <= piece.length <= chunk
      assert piece.start + piece.length <= size
    assert length <= size <= largest
    # Of what is read, at most a third is padding, or less than two pieces.
    assert sum(piece.length for piece in pieces) < length + max(32, chunk / 2)


@pytest.mark.parametrize('chunk, max_len', SIZES)
def test_few_prompts_need_every_program(chunk, max_len):
  engine = sizes(chunk, max_len)

  def needs(length):
    size = engine.prefix_size(length)
    return {(size, p.length, p.start == 0) for p in engine.pieces(length)}

  lengths = engine.program_lengths()
  assert all(1 <= length <= max_len for length in lengths)
  known = set().union(*map(needs, lengths))
  for length in range(1, max_len + 1):
    assert needs(length) <= known, length
  assert len(known) < 45


def test_sizes_that_cannot_be():
  for settings, message in (
    ({'slots': 0}, 'slots=0'),
    ({'max_len': 0}, 'max_len=0'),
    ({'images': 0}, 'images=0'),
    ({'chunk': 100}, 'chunk=100 is not a multiple of 128'),
    ({'cache_dtype': 'int4'}, "'int4' is neither"),
  ):
    with pytest.raises(ConfigError, match=message):
      EngineConfig(**settings)
  with pytest.raises(ConfigError, match='max_len=5000 .* 4096 positions'):
    Engine(toy.config(), {}, EngineConfig(max_len=5000))


def place(engine, state, bank, tokens, images=None, slot=0, **settings):
  """Reads a prompt into a slot."""
  request = Request.create(engine.config, tokens, images, **settings)
  reading = Reading(engine, bank, [request])
  while not reading.finished:
    reading.step()
  state = engine.insert(state, reading.prefix, [slot], [request.sampling])
  reading.release()
  return state


@pytest.mark.parametrize(
  # Images that a piece's border cuts, NTK twice, and LogN from the start.
  'case, length',
  [('text', 30), ('two_images', 535), ('long_text', 790)],
)
def test_pieces_and_steps_equal_the_full_forward(golden, case, length):
  engine = Engine(
    golden.config,
    golden.params,
    EngineConfig(slots=3, max_len=1024, chunk=128),
  )
  ids = golden.expected[f'eval/{case}/ids']
  full = golden_files.apply(True)(golden.params, golden_files.batch(ids))
  tokens, images = ids[0].tolist(), golden.images(ids[0])
  bank, state = ImageBank(engine), engine.init_state()
  for slot in (2, 0):
    prompt = tokens[: length - slot]
    state = place(engine, state, bank, prompt, images, slot)
  for step in range(8):
    for slot in (2, 0):
      np.testing.assert_allclose(
        state.logits[slot],
        full[0, length - slot + step - 1],
        atol=golden_files.ATOL,
      )
    state, _ = engine.choose(state)
    # What follows in the text, whatever was chosen.
    chosen = [tokens[length - slot + step] for slot in range(3)]
    state = engine.forward(engine.copy(state, [1], [1], chosen))


SMALL = EngineConfig(slots=3, max_len=512, chunk=128)


@pytest.fixture(scope='module', params=[None, 'int8'])
def small(request):
  """Sizes of an engine, with either kind of cache."""
  return dataclasses.replace(SMALL, cache_dtype=request.param)


@pytest.fixture(scope='module')
def engine(small):
  return Engine(CONFIG, toy.params(CONFIG), small)


def bytes_of(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_slot_is_updated_in_place(engine):
  """There is one cache: every step is given the old one and writes into it."""
  state = engine.init_state()
  cache, one = bytes_of(state.cache), bytes_of(state.cache) / engine.slots
  programs, prefix = engine._programs, engine.start([500])
  assert bytes_of(prefix.cache) == pytest.approx(one, rel=0.01)
  for lowered in (
    programs.forward.lower(engine.params, state),
    programs.choose.lower(state, None, top=3),
    programs.free.lower(state, np.int32(1)),
  ):
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.2 * cache
  bank, piece = engine.init_bank(), engine.pieces(500)[-1]
  tokens, rows = np.zeros(500, np.int32), np.full(500, -1, np.int32)
  engine.prefill(prefix, bank, [tokens], [rows], piece)
  assert prefix.cache.layers[0].keys.is_deleted()
  after, _ = engine.choose(state)
  assert state.cache.layers[0].keys.is_deleted()
  engine.forward(after)
  assert after.cache.layers[1].values.is_deleted()


def test_an_int8_cache_takes_little_more_than_a_quarter():
  """Of float32: a byte a value, and a float32 scale for each vector."""
  engines = [
    toy.engine(dim=128, slots=2, max_len=256, cache_dtype=dtype)
    for dtype in (None, 'int8')
  ]
  sizes = [bytes_of(engine.init_state().cache.layers) for engine in engines]
  assert sizes[1] / sizes[0] == pytest.approx(1 / 4 + 1 / 64, rel=0.01)


@pytest.mark.slow
def test_an_int8_cache_is_close(golden):
  """Three of the four golden answers stay, and one from its 8th token on not.

  Log-probabilities of the longest text move by 0.01 on average.
  """
  engine = Engine(
    golden.config,
    golden.params,
    EngineConfig(slots=4, max_len=1024, chunk=512, cache_dtype='int8'),
  )
  cases = ('text', 'one_image', 'cross', 'two_images')
  prompts, images = zip(*map(golden.prompt, cases), strict=True)
  answers = generate(engine, prompts, images, max_new_tokens=48)
  same = 0
  for case, ids in zip(cases, answers, strict=True):
    expected = golden.new(case)
    assert ids[:6] == expected[:6], case
    same += ids[: len(expected)] == expected
  assert same >= 3
  ids = golden.expected['eval/long_text/ids'][0].tolist()
  last = golden.expected['eval/long_text/logits_last64'][0]
  (found,) = score(engine, [ids[:742]], [ids[742:]])
  logprobs = np.asarray(jax.nn.log_softmax(last, axis=-1))
  error = np.abs(found.logprobs - logprobs[np.arange(63), ids[742:]])
  assert 0 < error.mean() < 0.02
  assert error.max() < 0.1


def answer(scheduler, tokens, images=None, max_new_tokens=60, **settings):
  """Answers one request, with nobody beside it."""
  request = Request.create(
    scheduler.engine.config,
    tokens,
    images,
    max_new_tokens=max_new_tokens,
    **settings,
  )
  found = scheduler.submit(request)
  while scheduler.step():
    pass
  return found


# The embedding of this token is not finite.
BAD = 7


def good(seed, length):
  return [8 if x == BAD else x for x in toy.prompt(seed, length)]


def all_finite(scheduler):
  # Steps of the others write a free slot's index 0, which every prompt takes.
  arrays = jax.tree.leaves(scheduler._state.cache.layers)
  return all(np.isfinite(x[:, :, 1:]).all() for x in arrays)


@pytest.mark.slow
def test_what_is_not_finite_stays_with_its_request(engine, small):
  """Neither its neighbours nor the next answer in its slot know of it."""
  never = Sampling(logit_bias={BAD: -100})
  plain = Scheduler(engine)
  prompts = [good(1, 20), good(2, 300)]
  alone = [answer(plain, prompt, sampling=never).ids for prompt in prompts]
  damaged = Engine(engine.config, toy.damaged(engine.params, BAD), small)
  scheduler = Scheduler(damaged)

  bad = good(3, 400)
  for place in (0, 200, 399):
    # In the first piece, between, and last; all slots get one.
    tokens = [*bad[:place], BAD, *bad[place + 1 :]]
    answers = [
      scheduler.submit(
        Request.create(CONFIG, ids, sampling=never, max_new_tokens=60)
      )
      for ids in (tokens, prompts[1], tokens)
    ]
    while scheduler.step():
      pass
    for failed in (answers[0], answers[2]):
      assert failed.finish_reason == 'error'
      assert 'logits after 0 new tokens are not finite' in str(failed.error)
    assert answers[1].ids == alone[1]
    assert all_finite(scheduler)
  for _ in range(3):
    assert answer(scheduler, prompts[0], sampling=never).ids == alone[0]

  # The step after the last token of an answer runs, though nobody waits for it.
  stopping = Sampling(stop_ids=(BAD,), min_new_tokens=40, logit_bias={BAD: 100})
  for _ in range(3):
    stopped = answer(scheduler, prompts[0], sampling=stopping)
    assert stopped.finish_reason == 'stop'
    assert len(stopped.ids) == 40
  assert all_finite(scheduler)
  for _ in range(3):
    assert answer(scheduler, prompts[0], sampling=never).ids == alone[0]
  # Said by the model itself.
  said = answer(scheduler, [1], sampling=Sampling(logit_bias={BAD: 100}))
  assert said.ids == [BAD]
  assert 'after 1 new tokens' in str(said.error)
  assert scheduler.load == Load(0, 0, 0, engine.slots)


def test_padding_brings_in_no_other_token(engine, small):
  """A damaged token that a prompt does not have does not matter to it."""
  for token in (0, 319):
    damaged = toy.damaged(engine.params, token)
    scheduler = Scheduler(Engine(engine.config, damaged, small))
    ids = [token + 1 if x == token else x for x in toy.prompt(1, 140)]
    bias = Sampling(logit_bias={token: -100})
    found = answer(scheduler, ids, sampling=bias, max_new_tokens=4)
    assert found.finish_reason == 'length', found.error
    assert all_finite(scheduler)


def test_pixels_that_are_not_finite(engine):
  scheduler = Scheduler(engine)
  pixels = np.zeros((2, toy.SIDE, toy.SIDE, 3), np.float32)
  tokens = toy.prompt(1, 60, 1)
  expected = answer(scheduler, tokens, pixels[:1], max_new_tokens=5).ids
  pixels[1, 0, 0] = np.nan
  for _ in range(2):
    found = answer(scheduler, tokens, pixels[1:], max_new_tokens=5)
    assert 'not finite' in str(found.error)
    again = answer(scheduler, tokens, pixels[:1], max_new_tokens=5)
    assert again.ids == expected


def test_a_model_that_is_not_finite_says_so(engine, small):
  nothing = jax.tree.map(lambda x: x * np.float32('nan'), engine.params)
  scheduler = Scheduler(Engine(engine.config, nothing, small))
  for seed in range(4):
    found = answer(scheduler, toy.prompt(seed, 20))
    assert 'the checkpoint is damaged' in str(found.error)
  assert scheduler.load.free == engine.slots
